"""Models whose tower takes pictures of one size, at a smaller size.

This is lower resolution for LLaVA-OneVision and VILA: their processors enlarge every picture to the
size of the tower, so that smaller media save nothing. Position embeddings are interpolated, as
`interpolate_pos_encoding` of transformers does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.registry import adapter_for
from tokencomp.inputs.loading import load_model


def at_side(name: str, side: int) -> tuple[Any, Any]:
    """An embedded model and its processor, both for pictures of `side` × `side` pixels.

    Parameters
    ----------
    name
        "tiny-llava-onevision" or "tiny-vila".
    """
    model, processor = load_model(name, device="cpu")
    embeddings = _embeddings(adapter_for(model).tower)
    before, patch = embeddings.image_size, embeddings.patch_size
    _interpolate(embeddings, before // patch, side // patch)
    embeddings.image_size = side
    for config in (model.config, getattr(processor, "config", None)):
        if config is not None:
            config.vision_config.image_size = side
    pixels = {"height": side, "width": side}
    processor.image_processor.size = pixels
    if hasattr(processor, "num_image_tokens"):
        processor.num_image_tokens = (side // patch) ** 2
        processor.video_processor.size = pixels
        for owner in (model.config, processor.image_processor):
            owner.image_grid_pinpoints = [
                [h * side // before, w * side // before] for h, w in owner.image_grid_pinpoints
            ]
    return model, processor


def _embeddings(tower: Any) -> Any:
    return next(m for m in tower.modules() if hasattr(m, "position_embedding"))


@torch.no_grad()
def _interpolate(embeddings: Any, before: int, after: int) -> None:
    """Give the embeddings positions for after × after patches."""
    old: Tensor = embeddings.position_embedding.weight
    grid = old.unflatten(0, (before, before)).permute(2, 0, 1)[None]
    grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic")
    new = nn.Embedding(after**2, old.shape[1])
    new.weight.copy_(grid[0].flatten(1).T)
    embeddings.position_embedding = new.to(old.dtype)
    embeddings.position_ids = torch.arange(after**2)[None]
    embeddings.num_patches = embeddings.num_positions = after**2
