"""Tiny multimodal models of the package `tokencomp_zoo`; `recipes/tiny` in a checkout trains them.

The code of that package is imported from here: `tokencomp.zoo.shapesqa` is the procedural benchmark
on which the models were trained. Without the package the import of this module raises a
`MissingDependencyError`. transformers loads the folders
without tokencomp (`AutoModelForImageTextToText`), but that of tiny-vila, which has the layout of
VILA. They exist so that accuracy under compression can be measured on any machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokencomp.inputs.packaged import (
    DEFAULT_MODEL,
    available_models,
    model_path,
    resolve,
    zoo_part,
)

if TYPE_CHECKING:
    import torch

SAMPLES = zoo_part("samples")
__path__.append(str(SAMPLES.parent))
"""Folder of a few images and videos, and of `questions.json`, which asks about them."""

__all__ = ["SAMPLES", "available_models", "load", "metrics", "model_path", "resolve"]


def load(name: str = DEFAULT_MODEL, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load an embedded model and its processor.

    Parameters
    ----------
    name : str
        One of `available_models()`.
    dtype : torch.dtype, optional
        Default float32, which is the fastest on CPUs; the weights are stored in float16.

    Returns
    -------
    (model, processor)
        The model is in eval mode on the CPU.
    """
    from tokencomp.inputs.loading import load_folder

    return load_folder(str(model_path(name)), dtype)


def metrics(name: str) -> dict[str, Any]:
    """What was measured when the model was trained: the numbers of its model card."""
    import json

    return json.loads((model_path(name) / "metrics.json").read_text())
