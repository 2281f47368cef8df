"""Methods of vLLM's classes that ours extend, compared once before the first compressing class.

A release that renames one of them would never call ours. Prompts would then stay uncompressed, or
get wrong positions, and nothing would raise.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from tokencomp.errors import UnsupportedModelError

PROCESSOR = {
    "get_dummy_inputs": (),
    "apply": ("inputs", "timing_ctx"),
    "_get_mm_hashes": ("inputs",),
    "_get_cache_missing_processor_kwargs": ("inputs", "mm_is_cached"),
    "_apply_hf_processor_main": ("mm_items", "hf_kwargs"),
    "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
    "_get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
}
MODEL = {
    "embed_multimodal": (),
    "embed_input_ids": ("input_ids", "multimodal_embeddings", "is_multimodal"),
    "forward": ("input_ids", "positions", "intermediate_tensors"),
}
MROPE = {"get_mrope_input_positions": ("input_tokens", "mm_features")}
PRUNING = {
    "recompute_mrope_positions": (
        "input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens",
    )
}  # fmt: skip


def check_class(stock: type, kind: str, offsets: bool) -> None:
    """Raise `UnsupportedModelError` unless a class of vLLM has the methods that ours extends.

    `kind` is "Model" or "Processor". `offsets`: a model with M-RoPE, whose rows carry offsets.
    """
    if kind == "Processor":
        _check(stock, PROCESSOR)
        return
    _check(stock, MODEL)
    if offsets:
        from vllm.model_executor.models.interfaces import SupportsMultiModalPruning

        _check(stock, MROPE)
        _check(SupportsMultiModalPruning, PRUNING)


def _check(stock: Any, methods: Mapping[str, tuple[str, ...]]) -> None:
    for name, wanted in methods.items():
        method = getattr(stock, name, None)
        found = inspect.signature(method).parameters if callable(method) else {}
        wrapped = any(p.kind is p.VAR_POSITIONAL for p in found.values())  # vLLM may wrap `forward`
        missing = [] if wrapped else [one for one in wanted if one not in found]
        if not callable(method) or missing:
            import vllm

            raise UnsupportedModelError(
                f"tokencomp cannot compress in vLLM {vllm.__version__}: {stock.__name__}.{name} "
                + ("is gone" if not callable(method) else f"takes no {', '.join(missing)}")
                + ". Install a tested release of vLLM (docs/support.md), or remove the tokencomp "
                "options to serve the model without compression."
            )
