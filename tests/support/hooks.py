"""A ragged prompt, and what hangs on the modules of a model."""

from __future__ import annotations

import torch
from torch import nn

from support.families import Family, text


def prompt(family: Family) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    second = [text(2, 4), family.video(4), text(4, 5)]
    return family.batch([[text(3), family.image(0), text(6, 3)], second])


def hooks_of(model: nn.Module) -> list[tuple[int, int, int]]:
    return [
        (len(m._forward_pre_hooks), len(m._forward_hooks), len(m.__dict__)) for m in model.modules()
    ]
