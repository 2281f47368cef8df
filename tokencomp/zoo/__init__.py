"""Tiny multimodal models that ship with the package, and the benchmark they were trained on.

The models are stock Hugging Face folders: ``AutoModelForImageTextToText.from_pretrained`` loads
them without tokencomp. They exist so that accuracy under compression means something anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencomp.errors import unknown_name

if TYPE_CHECKING:
    import torch

_MODELS = Path(__file__).parent / "models"
SAMPLES = Path(__file__).parent / "samples"

__all__ = ["SAMPLES", "available_models", "load", "metrics", "model_path", "resolve"]


def available_models() -> list[str]:
    """Names of the packaged models."""
    return sorted(config.parent.name for config in _MODELS.glob("*/config.json"))


def model_path(name: str) -> Path:
    """Folder of a packaged model.

    Raises
    ------
    UnknownNameError
        With close matches, when no model of that name is packaged.
    """
    if name not in available_models():
        raise unknown_name("embedded model", name, available_models())
    return _MODELS / name


def resolve(name_or_path: str | Path) -> str:
    """A packaged model's folder for its name; anything else (path, hub id) unchanged.

    A bare name that looks like a packaged model but is none raises instead of going to the hub.
    """
    name = str(name_or_path)
    if name in available_models():
        return str(_MODELS / name)
    if name.startswith("tiny-") and "/" not in name and not Path(name).exists():
        model_path(name)
    return name


def load(name: str = "tiny-qwen2-vl", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a packaged model and its processor with the stock auto classes.

    Parameters
    ----------
    name : str
        One of :func:`available_models`.
    dtype : torch.dtype, optional
        Default float32, which is the fastest on CPUs; the weights are stored in float16.

    Returns
    -------
    (model, processor)
        The model is in eval mode on the CPU.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tokencomp.models import register_auto_classes

    register_auto_classes()
    folder = model_path(name)
    dtype = torch.float32 if dtype is None else dtype
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def metrics(name: str) -> dict[str, Any]:
    """What was measured when the model was trained: the numbers behind its model card."""
    import json

    return json.loads((model_path(name) / "metrics.json").read_text())
