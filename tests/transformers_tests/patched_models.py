"""A pytest plugin that patches every model of our families in somebody else's tests.

Models are patched on their first call, not when they are made: tests make models to copy, save,
load and look at them, and a patched model refuses to be copied. The ratio comes from the
environment variable `TOKENCOMP_TEST_RATIO`; without it nothing is patched.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

RATIO = "TOKENCOMP_TEST_RATIO"
MARK = "_tokencomp_tested"


def pytest_configure(config: Any) -> None:
    """Replace `forward` and `generate` entry points by ones that patch first."""
    ratio = os.environ.get(RATIO)
    if ratio is None:
        return
    from transformers import PreTrainedModel
    from transformers.generation import GenerationMixin

    from tokencomp.adapters.registry import available_models

    # Read once, here: torch.compile traces `patched`, and cannot trace the import of adapters.
    served = frozenset(available_models())
    PreTrainedModel.__call__ = _patching(PreTrainedModel.__call__, float(ratio), served)
    GenerationMixin.generate = _patching(GenerationMixin.generate, float(ratio), served)


def _patching(call: Callable[..., Any], ratio: float, served: frozenset[str]) -> Callable[..., Any]:
    @functools.wraps(call)
    def patched(model: Any, *args: Any, **kwargs: Any) -> Any:
        if MARK not in model.__dict__ and _serves(model, served):
            import tokencomp

            model.__dict__[MARK] = True
            tokencomp.patch(model, ratio)
        return call(model, *args, **kwargs)

    return patched


def _serves(model: Any, served: frozenset[str]) -> bool:
    """Whether `model` is the whole model of a family that has an adapter."""
    return (
        type(model).__name__.endswith("ForConditionalGeneration")
        and getattr(getattr(model, "config", None), "model_type", None) in served
        and hasattr(model, "get_output_embeddings")
    )
