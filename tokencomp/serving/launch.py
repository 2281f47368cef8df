"""Start of a server by `tokencomp serve`: vLLM with the plugin, or our server on transformers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # it ships no types

from tokencomp.errors import MissingDependencyError, OptionError, UnsupportedModelError, install
from tokencomp.serving import ENV_OPTIONS, ENV_RULES, KEY
from tokencomp.serving.bind import Bind
from tokencomp.serving.limits import Limits
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm import LOADER
from tokencomp.serving.vllm.process import ENV_METRICS, ENV_OWNER, METRICS, hold_metrics
from tokencomp.serving.vllm.roles import ENV_ROUTER_KEY, ROLE_FLAGS
from tokencomp.serving.vllm.rules import Rules

logger = logging.getLogger("tokencomp.serving")
OVERRIDES = "--hf-overrides"
OWN = ("--host", "--api-key", "--allowed-local-media-path")
"""Flags that tokencomp must read itself, because its rules follow from them."""
GRAMMARS = "--structured-outputs-config"
SERVERS = ("--grpc", "--grpc-port")
"""Flags of further servers of vLLM, whose requests do not pass its middleware."""

MAX_REQUESTS = 1024 + 256  # that run, which is vLLM's largest default, and that wait


def vllm_command(
    model: str,
    options: dict[str, Any],
    bind: Bind,
    limits: Limits,
    extra: Sequence[str],
    paths: Sequence[str] = (),
    router_key: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Return command line and environment of `vllm serve` with the plugin.

    The arguments are those of `run_hf`; `extra` are further ones for `vllm serve`, `paths` further
    paths that answer, and `router_key` the secret with which a router sends transfer parameters.
    Raises a `TokenCompError` if vLLM is missing or cannot serve this.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            f"`--engine vllm` needs vLLM: {install('vllm')} (in its own environment), or use "
            "--engine hf."
        )
    # All spellings that argparse takes, also from files: a rule must not be missed by one.
    flags = given_flags(extra)
    trusts_kwargs = sets(flags, "--trust-request-mm-kwargs")
    parsed = ServerOptions.parse({**options, "only_own": not trusts_kwargs})
    check_flags(flags)
    low = parsed.low_detail_ratio
    if low is not None and (low > parsed.max_ratio or not parsed.per_request):
        raise OptionError(
            f"--low-detail-ratio {low}: on vLLM it is the ratio of a request, so it must not be "
            f"above --max-ratio ({parsed.max_ratio}), and --fixed leaves no room for it."
        )
    if parsed.ratio_by_load and not parsed.per_request:
        raise OptionError(
            "--ratio-by-load with --fixed: on vLLM it is the ratio of a request. Leave one out."
        )
    if parsed.ratio_by_load and any(sets(flags, flag) for flag in ROLE_FLAGS):
        raise OptionError(
            f"--ratio-by-load with {' or '.join(ROLE_FLAGS)}: every role would choose by another "
            "load, and an item must have one ratio in all of them. Leave it out."
        )
    if router_key and router_key == bind.api_key:
        raise OptionError(
            f"{ENV_ROUTER_KEY} is also the API key, which every client has: each could then send "
            "transfer parameters. Choose another value (openssl rand -hex 32)."
        )
    if check_architecture(model, parsed):
        options = {**options, "merge": False}
    command = [*_entry(model), "--host", bind.host, "--port", str(bind.port)]
    command += ["--middleware", "tokencomp.serving.vllm.middleware.VllmGuard"]
    if limits.allowed_path is not None:
        command += ["--allowed-local-media-path", str(limits.allowed_path.resolve())]
    # Who may fetch media, and who chooses frames: limits depend on both.
    remote = sets(flags, "--allowed-media-domains")
    ours = not sets(flags, "--media-io-kwargs") or _takes_frames(extra)
    options = {**options, "only_own": parsed.only_own}
    overrides, extra = _overrides(options, flags, extra)
    command += overrides
    env = {
        **os.environ,
        ENV_OPTIONS: json.dumps(options),  # for the middleware
        ENV_RULES: Rules(bind, limits, remote, trusts_kwargs, ours, tuple(paths)).as_json(),
        "TOKENCOMP_VLLM": "on",
    }
    if "VLLM_PLUGINS" in env:  # else all; without ours, vLLM would answer uncompressed
        env["VLLM_PLUGINS"] += ",tokencomp"
    if bind.api_key:
        env["VLLM_API_KEY"] = bind.api_key  # a command line would show it to all users
    env[ENV_ROUTER_KEY] = router_key or ""
    if parsed.per_request and not trusts_kwargs:
        # Only with this flag does vLLM pass processor options of a request on, but then it passes
        # on all of them. `only_own` and the middleware refuse every option except ours.
        command.append("--trust-request-mm-kwargs")
    if not remote:
        # By default vLLM fetches media from any host. This value allows no host.
        command += ["--allowed-media-domains", "invalid."]
    command += _video_arguments(limits, flags, extra)
    if not sets(flags, "--shutdown-timeout"):
        # By default vLLM aborts running requests at SIGTERM, and their clients wait in vain.
        command += ["--shutdown-timeout", str(bind.shutdown_timeout)]
    if not sets(flags, "--max-num-queued-reqs"):  # by default vLLM queues without limit
        command += ["--max-num-queued-reqs", str(MAX_REQUESTS)]
    if not sets(flags, GRAMMARS):
        # The default backend compiles a pattern of a hundred characters for minutes, in which the
        # engine answers nobody. This one compiles while it generates.
        command += [f"{GRAMMARS}.backend", "guidance"]
    if ENV_METRICS not in env:
        # In this mode of Prometheus, the reduction times of the workers reach /metrics.
        env[ENV_METRICS] = tempfile.mkdtemp(prefix=METRICS)
        env[ENV_OWNER] = str(os.getpid())  # which `run_vllm` keeps
    return [*command, *extra], env


def _overrides(
    options: dict[str, Any], flags: Sequence[str], extra: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Arguments that put our options into the config of the model, and the remaining `extra`.

    vLLM sends the config to workers on other nodes, but not the environment. Of several values of
    `--hf-overrides` vLLM takes the last, so that an operator's JSON is merged with ours.
    """
    ours, rest, words = json.dumps(options), list[str](), iter(extra)
    found: str | None = None
    if any(word.replace("_", "-").startswith(f"{OVERRIDES}.") for word in extra):
        return [f"{OVERRIDES}.{KEY}", ours], [*extra]  # vLLM merges values of this form
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == OVERRIDES:
            found = value if equals else next(words, None)
        else:
            rest.append(word)
    if sets(flags, OVERRIDES) and found is None:
        raise OptionError(f"{OVERRIDES} in a file of --config, or cut off: give it as JSON here.")
    try:
        theirs = json.loads(found or "{}")
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict) or KEY in theirs:
        raise OptionError(
            f"{OVERRIDES} {found}: expected a JSON object without {KEY!r}, whose options are those "
            "of this command (--ratio, --reducer, …)."
        )
    return [OVERRIDES, json.dumps({**theirs, KEY: options})], rest


def _video_arguments(limits: Limits, flags: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Arguments with which vLLM reads the frames of videos that `--engine hf` reads."""
    policy = {"frames": limits.policy} if limits.policy else {}
    video = {"video_backend": LOADER, "num_frames": limits.frames, **policy}
    loading = json.dumps({"video": video})
    if not sets(flags, "--media-io-kwargs"):
        return ["--media-io-kwargs", loading]
    if not _takes_frames(extra):
        logger.warning(
            "--media-io-kwargs: vLLM takes other frames of a video than --engine hf, and limits on "
            "videos do not hold. To keep both, add to its value: %s",
            loading,
        )
    return []


def _takes_frames(extra: Sequence[str]) -> bool:
    """Whether an operator who sets `--media-io-kwargs` names our loader of videos there."""
    written = " ".join([*extra, *_configs(extra)])
    return re.search(rf"video_backend\W+{LOADER}\b", written) is not None


def _entry(model: str) -> list[str]:
    """The command of `vllm serve MODEL`; builds of another package name have no command line."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


# -- arguments after `--`, which are for `vllm serve` ----------------------------------------------


def check_flags(flags: Sequence[str]) -> None:
    """Raise `OptionError` for flags that vLLM would take past the rules of this server."""
    for flag in OWN:
        if sets(flags, flag):
            own = flag.replace("local-", "")
            raise OptionError(f"{flag} after `--`: put {own} before it, where tokencomp sees it.")
    if "--router" in flags:
        raise OptionError(
            "--router: an address gave the rights of a router to all of its clients. Set "
            f"{ENV_ROUTER_KEY} of router, prefill and decode to one secret (docs/nodes.md)."
        )
    for flag in SERVERS:
        if sets(flags, flag):
            raise OptionError(
                f"{flag}: the key and the limits of tokencomp hold for HTTP alone. Leave it out, "
                "or run `vllm serve` itself."
            )


def given_flags(arguments: Sequence[str]) -> list[str]:
    """Names of the flags as vLLM reads them: with `-` for `_`, and those in files of `--config`."""
    names = [argument for argument in arguments if argument.startswith("--")]
    for text in _configs(arguments):
        try:
            content = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError):
            continue  # vLLM cannot read it either; its error says why
        pairs = content.items() if isinstance(content, dict) else ()
        # vLLM makes no flags of false and of empty lists.
        names += [f"--{key}" for key, value in pairs if value is not False and value != []]
    return [re.split(r"[=.]", name, maxsplit=1)[0].replace("_", "-") for name in names]


def _configs(arguments: Sequence[str]) -> list[str]:
    texts = []
    for argument, value in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, _, path = argument.partition("=")
        if name == "--config":
            with contextlib.suppress(OSError, ValueError):
                texts.append(Path(path or value).read_text(encoding="utf-8"))
    return texts


def sets(flags: Sequence[str], flag: str) -> bool:
    """Whether a flag is given; argparse also takes the beginning of a name."""
    return any(flag.startswith(name) for name in flags if len(name) > 2)


def check_architecture(model: str, options: ServerOptions) -> bool:
    """Refuse models that the plugin does not know, which vLLM would serve uncompressed.

    Also `merge=True` for families that cannot merge. Returns whether "auto" drops there.
    """
    from transformers import AutoConfig

    from tokencomp.serving.vllm import MODELS, NO_MERGING

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{model!r} cannot be read: {error}") from None
    names = list(getattr(config, "architectures", None) or [])
    if not set(names) & set(MODELS):
        raise UnsupportedModelError(
            f"{model!r} is a {', '.join(names) or 'model of unknown architecture'}; the vLLM "
            f"plugin compresses {', '.join(MODELS)}. Use --engine hf, or run `vllm serve` itself "
            "to serve it uncompressed."
        )
    unable = [NO_MERGING[name] for name in names if name in NO_MERGING]
    if not (options.merging and unable):
        return False
    if options.default.merge != "auto":
        raise OptionError(
            f"--merge on with {names[0]} on vLLM: {unable[0]}. Leave it out, or use --engine hf."
        )
    logger.warning("--merge auto drops with %s on vLLM: %s.", names[0], unable[0])
    return True


def run_vllm(command: list[str], env: Mapping[str, str], bind: Bind) -> None:
    """Replace this process with `vllm serve`, by the line and environment of `vllm_command`."""
    bind.take_port().close()  # a port that is taken ends the start before the model is loaded
    bind.warn_if_open()
    hold_metrics(Path(env[ENV_METRICS]))
    os.execve(command[0], command, env)


def run_hf(
    model: str,
    options: dict[str, Any],
    bind: Bind,
    limits: Limits,
    *,
    device: str = "auto",
    dtype: str = "auto",
    image_max_tokens: int | None = None,
    served_name: str | None = None,
    **engine: Any,
) -> None:
    """Serve with transformers until the process is interrupted.

    `options` are those of `ServerOptions.parse`; `device`, `dtype` and `image_max_tokens` as in
    `load_model`; `served_name` is what clients see, by default `model`; `engine` is for `Engine`.
    """
    parsed = ServerOptions.parse(options, engine="hf")
    try:
        from tokencomp.serving.hf.app import build_app, log_start, uvicorn_server
        from tokencomp.serving.hf.engine import Engine
        from tokencomp.serving.hf.metrics import Metrics
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"serving needs {error.name}: {install('serve')}.") from None
    from tokencomp.inputs.loading import load_model

    bind.warn_if_open()
    sockets = [bind.take_port()]  # a port that is taken ends the start before the model is loaded
    loaded, processor = load_model(
        model, device=device, dtype=dtype, image_max_tokens=image_max_tokens
    )
    backend = Engine(loaded, processor, parsed, Metrics(), **engine)
    app = build_app(backend, served_name or model, limits, bind)
    log_start(backend, served_name or model, bind)
    uvicorn_server(app, bind).run(sockets)
