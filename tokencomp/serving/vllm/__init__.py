"""The vLLM plugin, which registers model classes and leaves the engine unchanged.

    tokencomp serve --engine vllm --model M --ratio 0.75 -- [vllm serve arguments]
    vllm serve M --hf-overrides '{"tokencomp": {"reducer": "divprune", "ratio": 0.75}}'
    TOKENCOMP_SERVING='{"ratio": 0.5}' vllm serve M

The entry point `vllm.general_plugins: tokencomp` calls `register` in every engine process. Without
an option of tokencomp, vLLM then builds its own model and processor (see `entry`): nothing changes
and nothing is refused, on any version. With options, the model is a subclass of vLLM's own class.
Its processor emits fewer placeholders, and its `embed_multimodal` returns as many rows.

Options
    The options are `reducer`, `ratio` or `budget`, `options`, `tower_ratio` and `tower_reducer`; a
    server also has `max_ratio`, `per_request` and `only_own`. A request passes its own options in
    `mm_processor_kwargs={"tokencomp": {...}}` to an engine that was started with options, for which
    `{}` is enough: the engine then compresses only what requests ask for. Over HTTP, vLLM passes
    options of requests on only with `--trust-request-mm-kwargs`. `tokencomp serve` sets this flag
    and refuses all other processor options; read `middleware` before you set it yourself.
    Options of a request take precedence over `--mm-processor-kwargs`, these over `--hf-overrides`,
    and these over the environment. The resolved options, and the content of trained weights, are
    part of the media hash, so prefix and encoder caches never mix ratios.

Reducers
    Every reducer that is `serving_safe` can run: it ignores the question, acts at the entry stage,
    and its keep count follows from the grid alone. The server refuses other reducers at start.
    Layer stages need a KV length per layer, which vLLM does not have. The default is "kcentre".
    Features that are not finite cannot be compared, so such an item keeps evenly spaced tokens, and
    its values that are not finite become 0, also at ratio 0; the log and the metric
    `tokencomp_nonfinite_items` say so. In the KV cache they would spoil answers to later requests,
    which we saw on a CPU.

Vision tower
    With `tower_ratio`, the towers of the Qwen families see fewer patches (see `tower`). The counts
    follow from the grid, so placeholders and caches work as without it. Other families refuse it
    with the reason in `NO_TOWER_STAGE`, and so do engines with FlashInfer in the tower.

Positions
    M-RoPE models keep the original positions of kept tokens exactly (see `mrope`), and Qwen3-VL's
    timestamps stay between the frames (see `qwen3_vl`). In models with one position per token, the
    engine renumbers the tokens without gaps, which gives the outputs of
    `tokencomp.patch(model, ratio, positions="compact")`.

Tested and untested settings
    Whole engines are tested on a CPU, which means vLLM's model runner V1: eager mode, one worker,
    prefix caching and chunked prefill. Of model runner V2, which vLLM uses on GPUs, the tests run
    the parts that concern positions (vLLM's pruner, its gathering of media rows, and the plugin's
    state) on several requests in random windows. No engine with V2, no GPU, no tensor parallelism
    and no speculative decoding has been run by us.
    The plugin refuses settings with wrong results: for M-RoPE models pipeline parallelism, and
    under V1 dual batch overlap and speculative decoding; vLLM's own video pruning for all models.
    Under V1, CUDA graphs of M-RoPE models become piecewise; under V2 they stay. The vision tower is
    not captured. Unless TOKENCOMP_ALLOW_UNTESTED=1, untested settings are refused: other versions
    than 0.32 and 0.33, data-parallel encoders, disaggregated encoders and disaggregated prefill.
    If the outputs of a vision tower depend on its batch, a data-dependent reducer can choose other
    tokens when an evicted item is encoded again.
    Architectures that are not in `MODELS` never reach this code: `vllm serve` then runs them
    uncompressed, while `tokencomp serve` refuses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from importlib import import_module
from typing import Any

from tokencomp.serving import ENV_RULES

ENV_OFF = "TOKENCOMP_VLLM"
LOADER = "tokencomp"  # name of `frames.ChosenFrames` among vLLM's loaders of videos
PR_SET_PDEATHSIG = 1  # of prctl(2)
TESTED_VERSIONS = ("0.32", "0.33")

# Architecture → the module of this package with its mixins `Model` and `Processor`.
MODELS = {
    "Glm4vForConditionalGeneration": "glm4v",
    "Glm4vMoeForConditionalGeneration": "glm4v",
    "InternVLChatModel": "internvl",
    "InternVLForConditionalGeneration": "internvl",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Qwen2VLForConditionalGeneration": "mrope",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3_5ForConditionalGeneration": "qwen3_vl",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
}
# Modules whose families have no stage in the vision tower, and why.
_DENSE = "its vision tower takes batches of pictures, and this plugin shortens packed towers only"
NO_TOWER_STAGE = {
    "glm4v": "which patches of its vision tower a visual token reads has not been checked",
    "internvl": _DENSE,
    "llava_onevision": _DENSE,
}
# Architectures that users may miss in `MODELS`, and why they are not there.
NOT_SERVED = {
    "Gemma3ForConditionalGeneration": "its images need attention masks, which vLLM's attention on "
    "a CPU does not have, so that no test of this plugin could see a mistake",
}
STOCK: dict[str, Any] = {}  # what vLLM's registry had for these architectures


def enabled() -> bool:
    """Whether the plugin is active, which `TOKENCOMP_VLLM=off` in the environment prevents."""
    return os.environ.get(ENV_OFF, "").lower() not in ("off", "0", "false", "no")


def untested_version() -> str:
    """Return what to say about an installed vLLM that is untested, or "" if it is tested."""
    import vllm

    version = vllm.__version__
    if version.startswith(tuple(f"{v}." for v in TESTED_VERSIONS)):
        return ""
    tested = ", ".join(f"{v}.x" for v in TESTED_VERSIONS)
    return f"vLLM {version} (tested: {tested}; install one of these)"


def end_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, if that is a part of it.

    The engine and its workers would otherwise outlive a server that was killed, and keep its
    memory. Only Linux can do so.
    """
    if multiprocessing.parent_process() is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def register() -> None:
    """Put the classes of `entry` and `frames` into vLLM's registries. Repeated calls are harmless.

    The names of the classes contain vLLM's version, because vLLM stores what it learns about a
    class under its name and the hash of our file, and an update of vLLM changes neither.
    """
    if not enabled():
        return
    if ENV_RULES in os.environ:  # a process of `tokencomp serve`
        end_with_parent()
    import vllm

    registry = vllm.ModelRegistry
    entry = f"{__name__}.entry"
    for architecture in MODELS:
        stock = registry.models.get(architecture)
        if stock is None or getattr(stock, "module_name", "") == entry:
            continue  # this vLLM has no such model, or the class is registered already
        STOCK[architecture] = stock
        registry.register_model(architecture, f"{entry}:{architecture}__{vllm.__version__}")
    with contextlib.suppress(ImportError, AttributeError):  # another version of vLLM
        import_module(f"{__name__}.frames")
