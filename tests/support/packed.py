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
    singles = [family.batch([row]) for row in rows]
    positions = [family.positions(model, one) for one in singles]
    if family.mrope:
        # The first of four rows counts tokens; transformers finds the prompts by it.
        counts = [torch.arange(p.shape[-1]).expand(1, 1, -1) for p in positions]
        positions = [torch.cat([c, p]) for c, p in zip(counts, positions, strict=True)]
    packed = {"position_ids": torch.cat(positions, -1)}
    for name in ("input_ids", "mm_token_type_ids", "token_type_ids"):
        if name in singles[0]:
            packed[name] = torch.cat([one[name] for one in singles], 1)
    rest = dict.fromkeys(k for one in singles for k in one if k not in (*packed, "attention_mask"))
    return {**packed, **{k: torch.cat([one[k] for one in singles if k in one]) for k in rest}}
