"""What `tokencomp serve` runs: vLLM with the plugin, or our server on transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokencomp.errors import MissingDependencyError, OptionError, UnsupportedModelError
from tokencomp.serving.hf.media import Limits
from tokencomp.serving.spec import ServerOptions


@dataclass(frozen=True)
class Bind:
    """Where to listen, and who may ask."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None


def vllm_command(
    model: str, options: dict[str, Any], bind: Bind, limits: Limits, extra: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of `vllm serve` with the plugin.

    Raises
    ------
    MissingDependencyError
        vLLM is not installed.
    OptionError, RatioError, UnsupportedModelError
        The engine cannot serve this reducer, ratio or model.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "`--engine vllm` needs vLLM: pip install 'tokencomp[vllm]' (in its own environment), "
            "or use --engine hf."
        )
    trusting = "--trust-request-mm-kwargs" in extra
    parsed = ServerOptions.parse({**options, "only_own": not trusting})
    check_architecture(model)
    command = [*_entry(model), "--host", bind.host, "--port", str(bind.port)]
    if limits.allowed_path is not None:
        command += ["--allowed-local-media-path", str(limits.allowed_path.resolve())]
    env = {
        **os.environ,
        "TOKENCOMP_SERVING": json.dumps({**options, "only_own": parsed.only_own}),
        "TOKENCOMP_VLLM": "on",
        # model runner V2 is untested with compressed M-RoPE media
        "VLLM_USE_V2_MODEL_RUNNER": os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0"),
    }
    if bind.api_key:
        env["VLLM_API_KEY"] = bind.api_key  # command lines are visible to all users of a machine
    if parsed.per_request and not trusting:
        # vLLM hands the options of requests on only with this flag, and with it much else:
        # only_own and the middleware narrow it to ours
        command.append("--trust-request-mm-kwargs")
        command += ["--middleware", "tokencomp.serving.vllm.middleware.OwnOptionsOnly"]
    if "--allowed-media-domains" not in extra:
        # vLLM fetches remote media by default: allow no host
        command += ["--allowed-media-domains", "invalid."]
    # lets the workers' times reach /metrics
    env.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="tokencomp-metrics-"))
    return [*command, *extra], env


def _entry(model: str) -> list[str]:
    """`vllm serve MODEL`; builds published under another name have a CLI that does not start."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def check_architecture(model: str) -> None:
    """Refuse models that the plugin would silently serve uncompressed."""
    from transformers import AutoConfig

    from tokencomp.serving.vllm import MODELS

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{model!r} cannot be read: {error}") from None
    given = list(getattr(config, "architectures", None) or [])
    if not set(given) & set(MODELS):
        raise UnsupportedModelError(
            f"{model!r} is a {', '.join(given) or 'model of unknown architecture'}; the vLLM "
            f"plugin compresses {', '.join(MODELS)}. Use --engine hf, or run `vllm serve` itself "
            "to serve it uncompressed."
        )


def run_vllm(
    model: str, options: dict[str, Any], bind: Bind, limits: Limits, extra: Sequence[str]
) -> None:
    """Replace this process by `vllm serve`."""
    command, env = vllm_command(model, options, bind, limits, extra)
    os.execve(command[0], command, env)


def check_port(bind: Bind) -> None:
    """Raise `OptionError` before a model is loaded if nothing can listen at `bind`."""
    kind, passive = socket.SOCK_STREAM, socket.AI_PASSIVE
    try:
        found = socket.getaddrinfo(bind.host or None, bind.port, type=kind, flags=passive)
        for family, _, _, _, address in found:
            with socket.socket(family, kind) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(address)
    except (OSError, UnicodeError) as error:
        raise OptionError(
            f"cannot listen at {bind.host}:{bind.port}: {error}. Give another --host or --port."
        ) from error


def run_hf(
    model: str,
    options: dict[str, Any],
    bind: Bind,
    limits: Limits,
    *,
    device: str = "auto",
    dtype: str = "auto",
    served_name: str | None = None,
    **engine: Any,
) -> None:
    """Serve with transformers until interrupted; `engine` goes to `Engine`.

    Raises
    ------
    MissingDependencyError
        FastAPI, uvicorn or prometheus-client is missing.
    OptionError, RatioError, UnsupportedModelError, WeightsError
        Bad options, a port that is taken, a model that no adapter serves, or a default reducer
        without its weights.
    """
    parsed = ServerOptions.parse(options, engine="hf")
    if limits.allowed_path is not None and not limits.allowed_path.is_dir():
        raise OptionError(f"--allowed-media-path {limits.allowed_path}: not a directory.")
    try:
        import uvicorn

        from tokencomp.serving.hf.api import build_app
        from tokencomp.serving.hf.engine import Engine
        from tokencomp.serving.hf.metrics import Metrics
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs {error.name}: pip install 'tokencomp[serve]'."
        ) from None
    from tokencomp.inputs.loading import load_model

    check_port(bind)
    loaded, processor = load_model(model, device=device, dtype=dtype)
    made = Engine(loaded, processor, parsed, Metrics(), **engine)
    app = build_app(made, served_name or model, limits, bind.api_key)
    uvicorn.run(app, host=bind.host, port=bind.port, log_level="info")
