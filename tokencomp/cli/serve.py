"""`tokencomp serve`: an OpenAI-compatible server with compression."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli import _parse as parse

VLLM_HINT = "use vLLM's own arguments after `--` (--max-num-seqs, --mm-processor-kwargs, ...)"
MLX_HINT = "use the arguments of mlx_vlm.server after `--` (--max-tokens, ...)"
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


@opt.flat
def command(
    context: typer.Context,
    method: opt.StageFlags,
    source: opt.Source,
    ratio: Annotated[
        str | None,
        typer.Option(
            "--ratio",
            help="Default ratio in [0, 1): 0.5, of delta and pixelprune 0; or one per modality.",
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option("--budget", help="Default number of visual tokens per item, not --ratio."),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option("--speedup", help="Default factor by which the work falls (hf), not --ratio."),
    ] = None,
    reducer: Annotated[
        str,
        typer.Option(
            "--reducer",
            "-r",
            help="Default reducer (tokencomp list), with options as in 'condiv(power=2)'.",
        ),
    ] = "auto",
    engine: Annotated[str, typer.Option("--engine", help='"hf", "vllm" or "mlx".')] = "hf",
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    max_ratio: Annotated[
        float | None,
        typer.Option("--max-ratio", help="Largest ratio a request may ask for (0.95, or --ratio)."),
    ] = None,
    per_request: Annotated[
        bool,
        typer.Option("--per-request/--fixed", help="May requests bring their own options?"),
    ] = True,
    allowed_media_path: Annotated[
        Path | None,
        typer.Option(
            "--allowed-media-path",
            exists=True,
            file_okay=False,
            help="Directory that file: URLs may point below.",
        ),
    ] = None,
    api_key: opt.ApiKey = None,
    allowed_host: opt.AllowedHost = None,
    shutdown_timeout: opt.ShutdownTimeout = 60,
    served_name: Annotated[
        str | None, typer.Option("--served-model-name", help="Name that clients use.")
    ] = None,
    low_detail_ratio: Annotated[
        float | None,
        typer.Option(
            "--low-detail-ratio", help='Ratio of images that requests send as detail "low".'
        ),
    ] = None,
    ratio_by_load: Annotated[
        str | None,
        typer.Option(
            "--ratio-by-load",
            help="Ratio of requests with media that name none, by the number of unanswered visual "
            'tokens: "0.75:4096,0.9:8192".',
        ),
    ] = None,
    allow_path: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-path",
            help="Further path of vLLM that answers, such as /v1/responses; with a slash at its "
            "end, all below it; repeatable.",
        ),
    ] = None,
    router_key: opt.RouterKey = None,
    frames: Annotated[
        str,
        typer.Option(
            "--frames", help='Frames of a video, also the most that requests get: 32, "stream:32".'
        ),
    ] = "32",
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Batch size (hf).")] = 8,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, help="Prompt and answer.")
    ] = None,
) -> None:
    """Serve a model over OpenAI's chat-completions API.

    `--engine hf` serves every supported model with every reducer; `--engine vllm` runs
    `vllm serve` with tokencomp's plugin, and hands it all further arguments (after `--`);
    it drops unless `--merge auto` (or on) gives attention the room for weights that merging needs;
    `--engine mlx` does the same with mlx_vlm.server, with one setting for all requests.

    Requests may bring `{"tokencomp": {"ratio": 0.75}}` or `{"tokencomp": {"budget": 512}}`, or the
    same in `mm_processor_kwargs`, as `vllm serve` reads it.
    """
    from tokencomp.errors import OptionError
    from tokencomp.inputs.packaged import resolve
    from tokencomp.inputs.video.frames import Even, Stream, frame_policy
    from tokencomp.plan.options import OPTIONS, one_amount
    from tokencomp.serving.bind import Bind

    name, own = parse.one_method(reducer, "serve")
    number = None if ratio is None else parse.one_ratio(ratio, "serve")
    size = one_amount(number, budget, None, speedup)
    if engine == "mlx":  # which needs no torch, and the imports below do
        from tokencomp.mlx.method import MlxMethod
        from tokencomp.mlx.serve import run

        taken = {
            "model", "ratio", "budget", "reducer", *OPTIONS, "engine", "host", "port", "api_key",
        }  # fmt: skip
        others = [str(p.name) for p in context.command.params if p.name not in taken]
        opt.refuse_options(context, others, "--engine mlx", MLX_HINT)
        if api_key:
            os.environ["MLX_VLM_SERVER_API_KEY"] = api_key
        Bind(host, port, api_key).warn_if_open()
        size = size or {"ratio": 0.5}
        chosen = MlxMethod(name, options=own, **method.given_options, **size)
        run(resolve(source.model), chosen, host, port, context.args)
        return
    from tokencomp.method import usual_ratio
    from tokencomp.serving.launch import run_hf, run_vllm, vllm_command
    from tokencomp.serving.limits import Limits

    options = {
        "reducer": name,
        **(size or {"ratio": usual_ratio(name)}),
        "options": own,
        **method.stages,
        "per_request": per_request,
        **({} if max_ratio is None else {"max_ratio": max_ratio}),
        **({} if low_detail_ratio is None else {"low_detail_ratio": low_detail_ratio}),
        **({} if ratio_by_load is None else {"ratio_by_load": ratio_by_load}),
    }
    policy = frame_policy(frames)
    if not isinstance(policy, Even | Stream):
        raise OptionError(
            f"--frames {frames!r}: a server needs a number, which bounds its requests: 32 or "
            "stream:32. Requests may ask for a rate."
        )
    named = str(policy) if isinstance(policy, Stream) else ""
    limits = Limits(allowed_path=allowed_media_path, frames=policy.count, policy=named)
    bind = Bind(host, port, api_key, tuple(allowed_host or ()), shutdown_timeout)
    if engine == "vllm":
        ineffective = ("device", "max_batch", "image_max_tokens")
        opt.refuse_options(context, ineffective, "--engine vllm", VLLM_HINT)
        extra, folder = [*context.args], resolve(source.model)
        if folder != source.model and not any(a.startswith("--served-model-name") for a in extra):
            served_name = served_name or source.model  # not where an embedded model lies
        if served_name:
            extra += ["--served-model-name", served_name]
        if max_model_len:
            extra += ["--max-model-len", str(max_model_len)]
        if source.dtype != "auto":
            extra += ["--dtype", source.dtype]
        paths = allow_path or ()
        run_vllm(*vllm_command(folder, options, bind, limits, extra, paths, router_key), bind)
        return
    opt.refuse_options(context, ("allow_path",), f"--engine {engine}", "it has no further paths")
    opt.refuse_options(context, ("router_key",), f"--engine {engine}", "it has no roles")
    if engine != "hf":
        start = " SGLang is started differently: docs/engines.md." if engine == "sglang" else ""
        raise OptionError(f"--engine {engine!r}: use 'hf', 'vllm' or 'mlx'.{start}")
    if context.args:
        raise OptionError(
            f"unknown arguments {' '.join(context.args)} (only vllm and mlx take more)."
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_hf(
        source.model, options, bind, limits, device=source.device, dtype=source.dtype,
        image_max_tokens=source.image_max_tokens, served_name=served_name, max_batch=max_batch,
        max_model_len=max_model_len,
    )  # fmt: skip
