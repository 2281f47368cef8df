"""Several prompts in one row, as collators for training pack them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.families import Family, text


def prompts(family: Family) -> list[list[Any]]:
    """Two prompts with an image, and one of text alone."""
    return [
        [text(3), family.image(0), text(9, 3)],
        [text(5, 8), family.image(1), text(4, 5)],
        [text(4, 9)],
    ]


def pack(family: Family, model: nn.Module, rows: list[list[Any]]) -> dict[str, Tensor]:
    """One row of all prompts: positions start again in every prompt, and there is no mask."""
    packed = family.batch([[item for row in rows for item in row]])
    del packed["attention_mask"]
    positions = [family.positions(model, family.batch([row])) for row in rows]
    if family.mrope:
        # The first of four rows counts tokens; transformers finds the prompts by it.
        counts = [torch.arange(p.shape[-1]).expand(1, 1, -1) for p in positions]
        positions = [torch.cat([c, p]) for c, p in zip(counts, positions, strict=True)]
    return {**packed, "position_ids": torch.cat(positions, -1)}
