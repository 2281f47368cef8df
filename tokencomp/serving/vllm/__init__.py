"""The vLLM plugin, which registers model classes and leaves the engine unchanged.

    tokencomp serve --engine vllm --model M --ratio 0.75 -- [vllm serve arguments]
    vllm serve M --hf-overrides '{"tokencomp": {"reducer": "divprune", "ratio": 0.75}}'
    TOKENCOMP_SERVING='{"ratio": 0.5}' vllm serve M

The entry point `vllm.general_plugins: tokencomp` calls `register` in every engine process. Each
class is a subclass of vLLM's own model. Its processor emits fewer placeholders, and its
`embed_multimodal` returns as many rows. Without options nothing is compressed, and the outputs are
those of stock vLLM.

Options
    The options are `reducer`, `ratio` and `options`; a server also has `max_ratio`, `per_request`
    and `only_own`. A request passes its own options in `mm_processor_kwargs={"tokencomp": {...}}`.
    Over HTTP, vLLM passes these on only with `--trust-request-mm-kwargs`. `tokencomp serve` sets
    this flag and refuses all other processor options; read `middleware` before you set it yourself.
    Options of a request take precedence over `--mm-processor-kwargs`, these over `--hf-overrides`,
    and these over the environment. The resolved options are part of the media hash, so prefix and
    encoder caches never mix ratios.

Reducers
    Every reducer with `serving_safe` can run: it ignores the question, acts at the entry stage, and
    its keep count follows from the grid alone. The server refuses other reducers at start. Layer
    stages need a KV length per layer, which vLLM does not have. The default is "divprune".

Positions
    M-RoPE models keep the original positions of kept tokens exactly (see `mrope`), and Qwen3-VL's
    timestamps stay between the frames (see `qwen3_vl`). In models with one position per token, the
    engine renumbers the tokens without gaps, which gives the outputs of
    `tokencomp.patch(model, ratio, positions="compact")`.

Tested and untested settings
    The plugin is tested with vLLM 0.32 on a CPU: eager mode, one worker, V1 model runner, prefix
    caching and chunked prefill. It refuses settings with wrong results: pipeline parallelism, dual
    batch overlap and speculative decoding for M-RoPE models, and vLLM's own video pruning. Unless
    TOKENCOMP_ALLOW_UNTESTED=1, it refuses untested settings: other versions, model runner V2 for
    M-RoPE models, data-parallel encoders, disaggregated encoders and disaggregated prefill. GPUs
    (CUDA graphs of M-RoPE models become piecewise, and the vision tower is not captured) and tensor
    parallelism are allowed, but we have not run them.
    If the outputs of a vision tower depend on its batch, a data-dependent reducer can choose other
    tokens when an evicted item is encoded again.
    vLLM answers 500 instead of 4xx to a file: URL that names no file below its media path.
    Architectures that are not in `MODELS` never reach this code: `vllm serve` then runs them
    uncompressed, while `tokencomp serve` refuses them.
"""

from __future__ import annotations

import os

ENV_OPTIONS = "TOKENCOMP_SERVING"
ENV_OFF = "TOKENCOMP_VLLM"
ENV_UNTESTED = "TOKENCOMP_ALLOW_UNTESTED"
TESTED_VERSIONS = ("0.32",)

MODELS = {
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:TokencompLlavaOnevision",
    "Qwen2VLForConditionalGeneration": "qwen2_vl:TokencompQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl:TokencompQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "qwen3_vl:TokencompQwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl:TokencompQwen3VLMoe",
}


def enabled() -> bool:
    """Whether the plugin is active, which `TOKENCOMP_VLLM=off` in the environment prevents."""
    return os.environ.get(ENV_OFF, "").lower() not in ("off", "0", "false", "no")


def register() -> None:
    """Replace the supported architectures in vLLM's registry. Repeated calls are harmless."""
    if not enabled():
        return
    from vllm import ModelRegistry

    for architecture, target in MODELS.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{target}")
