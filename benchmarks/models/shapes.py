"""Real model shapes with random weights: speed and memory can be measured without any checkpoint.

Never for accuracy. Sizes are those of the published configurations.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models.architectures import ARCHITECTURES, Shape
from tokencomp.errors import OptionError, unknown_name

SHAPES = {
    "tiny": Shape("qwen2_vl", 256, 64, 2, 2, 1),  # of no model, for rehearsals
    "llava-onevision-0.5b": Shape("llava_onevision", 896, 4864, 24, 14, 2),
    "llava-onevision-7b": Shape("llava_onevision", 3584, 18944, 28, 28, 4, tied=False),
    "qwen2-vl-2b": Shape("qwen2_vl", 1536, 8960, 28, 12, 2),
    "qwen2-vl-7b": Shape("qwen2_vl", 3584, 18944, 28, 28, 4, tied=False),
    "qwen2.5-vl-3b": Shape("qwen2_5_vl", 2048, 11008, 36, 16, 2),
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", 3584, 18944, 28, 28, 4, tied=False),
    "qwen3-vl-2b": Shape("qwen3_vl", 2048, 6144, 28, 16, 8),
    "qwen3-vl-4b": Shape("qwen3_vl", 2560, 9728, 36, 32, 8),
    "qwen3-vl-8b": Shape("qwen3_vl", 4096, 12288, 36, 32, 8, tied=False, large_tower=True),
    "nvila-lite-2b": Shape("vila", 1536, 8960, 28, 12, 2),
    "nvila-lite-8b": Shape("vila", 3584, 18944, 28, 28, 4, tied=False),
}


def build(
    name: str,
    tokens: int,
    *,
    layers: int | None = None,
    vision_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Any, dict[str, Any]]:
    """A model of that shape, and the inputs of one prompt with a video.

    Parameters
    ----------
    name
        One of `SHAPES`.
    tokens
        Requested number of visual tokens; the nearest whole number of frames is taken.
    layers, vision_layers
        Fewer decoder or vision layers than published; None for all.

    Raises
    ------
    UnknownNameError, OptionError
        An unknown name; less than one token.
    """
    if name not in SHAPES:
        raise unknown_name("configuration", name, SHAPES)
    if tokens < 1:
        raise OptionError(f"tokens={tokens}: expected a positive number of visual tokens.")
    shape, make = SHAPES[name], ARCHITECTURES[SHAPES[name].family]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make.model(shape, layers or shape.layers, vision_layers).eval()
    finally:
        torch.set_default_dtype(before)
    return model, make.inputs(tokens, dtype, device)


def accepted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without those that this transformers release does not know (mm_token_type_ids)."""
    import inspect

    known = inspect.signature(type(model).forward).parameters
    return {k: v for k, v in inputs.items() if k in known}
