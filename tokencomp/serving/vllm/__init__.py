"""The vLLM plugin: out-of-tree model classes, no change to the engine.

    tokencomp serve --engine vllm --model M --ratio 0.75 -- [vllm serve arguments]
    vllm serve M --hf-overrides '{"tokencomp": {"reducer": "divprune", "ratio": 0.75}}'
    TOKENCOMP_SERVING='{"ratio": 0.5}' vllm serve M

The entry point `vllm.general_plugins: tokencomp` calls `register` in every engine process. Each
class is a subclass of vLLM's own model with a processor that emits fewer placeholders, and an
`embed_multimodal` that returns as many rows. Without options nothing is compressed, and outputs
are stock vLLM's.

Options
    `reducer`, `ratio`, `options`; per server also `max_ratio`, `per_request`, `only_own`. A request
    brings its own in `mm_processor_kwargs={"tokencomp": {...}}`; over HTTP vLLM passes these on
    only with `--trust-request-mm-kwargs` (`tokencomp serve` sets it, and lets nothing but
    "tokencomp" through: see `middleware` before you set it yourself). Request >
    `--mm-processor-kwargs` > `--hf-overrides` > environment. The resolved options are part of the
    media hash, so prefix and encoder caches never mix ratios.

Reducers
    All with `serving_safe`: question-agnostic, entry stage, exact count from the grid alone. Others
    are refused at start; layer stages need one KV length per layer, which vLLM does not have.
    The default is "divprune".

Positions
    M-RoPE models keep the original positions of kept tokens, exactly (see `mrope`); Qwen3-VL's
    timestamps stay between the frames (see `qwen3_vl`). Models with
    one position per token are renumbered without gaps by the engine; the same outputs come from
    `tokencomp.patch(model, ratio, positions="compact")`.

Tested and untested
    Tested with vLLM 0.32 on CPU: eager, one worker, V1 model runner, prefix caching, chunked
    prefill. Refused, because it would be wrong: pipeline parallelism, dual batch overlap and
    speculative decoding for M-RoPE models, and vLLM's own video pruning. Refused as untested unless
    TOKENCOMP_ALLOW_UNTESTED=1: other versions, model runner V2 for M-RoPE models, data-parallel
    encoders, disaggregated encoders and prefill. Allowed and never run here: GPUs (CUDA graphs of
    M-RoPE models become piecewise, and the vision tower is not captured) and tensor parallelism.
    Where a vision tower's numbers depend on its batch, a data-dependent reducer can choose another
    set when an evicted item is encoded again.
    vLLM answers 500, not 4xx, to a file: URL that names no file below its media path.
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
    """False if the environment says `TOKENCOMP_VLLM=off`."""
    return os.environ.get(ENV_OFF, "").lower() not in ("off", "0", "false", "no")


def register() -> None:
    """Replace the served architectures in vLLM's registry. Safe to call many times."""
    if not enabled():
        return
    from vllm import ModelRegistry

    for architecture, target in MODELS.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{target}")
