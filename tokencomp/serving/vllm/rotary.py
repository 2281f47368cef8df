"""Longer rotary tables, as kept tokens have positions beyond the length of the prompt."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

TABLE_FACTOR = 4  # rotary tables have this many times the model's positions


def lengthen_tables(model: nn.Module, length: int) -> None:
    """Extend all rotary tables of a model to positions below `length`; old entries do not change.

    Positions can exceed the prompt's length, because kept tokens keep their original positions.
    """
    for table in {m for m in model.modules() if isinstance(m, MRotaryEmbedding)}:
        old = table.cos_sin_cache
        if old.shape[0] >= length:
            continue
        # The engine's own method would scale YaRN's frequencies to the new length.
        inv_freq = table._compute_inv_freq(table.scaling_factor or table.base)
        angles = torch.arange(old.shape[0], length, dtype=torch.float)[:, None] * inv_freq
        more = torch.cat([angles.cos(), angles.sin()], dim=-1) * table.mscale
        table.cos_sin_cache = torch.cat([old, more.to(old)])
