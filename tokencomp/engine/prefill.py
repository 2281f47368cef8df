"""Chunked prefill (`prefill_chunk_size`) under a patch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

PREFILL = "_prefill"  # the method of transformers' generation that runs it


def install(model: Any, carries_features: Callable[[dict[str, Any]], bool]) -> None:
    """Replace `model._prefill`, where the release has it: visual prompts go in one pass.

    With `prefill_chunk_size` a chunk boundary could cut a span, and the question that some
    reducers look at comes last; the compressed prompt is what chunking was meant to make small.
    Text-only prompts stay chunked.
    """
    if hasattr(model, PREFILL):
        model.__dict__[PREFILL] = functools.partial(_one_pass, carries_features, model)


def remove(model: Any) -> None:
    """Undo `install`; safe to call twice."""
    model.__dict__.pop(PREFILL, None)


def _one_pass(
    carries_features: Callable[[dict[str, Any]], bool],
    model: Any,
    input_ids: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    chunked = getattr(generation_config, "prefill_chunk_size", None) is not None
    if chunked and carries_features(model_kwargs):
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = None
    return type(model)._prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
