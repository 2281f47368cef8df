"""The ccam projector of one sample, with whole attention maps and masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokencomp.trained.ccam import CCAMProjector


def dense(made: CCAMProjector, x: Tensor, frames: int, places: Tensor | None = None) -> Tensor:
    """One sample (F·P, kv), with the whole Q × F·P map and its mask."""
    c = made.config
    per_frame = x.shape[0] // frames
    kv = F.layer_norm(x, (c.kv_dim,), made.norm_key.weight, made.norm_key.bias, c.eps)
    query = made.query
    normed = F.layer_norm(query, (c.width,), made.norm_query.weight, made.norm_query.bias, c.eps)
    q, k, v = made.q_proj(normed), made.k_proj(kv), made.v_proj(kv)
    if places is not None:
        k = k + places.repeat(frames, 1)
    seen = torch.zeros(c.queries, x.shape[0], dtype=torch.bool)
    for i in range(c.queries):
        for f in range(frames):
            if f <= i * frames // c.queries or not c.causal:
                seen[i, f * per_frame : (f + 1) * per_frame] = True
    heads = []
    size = c.width // c.heads
    for h in range(c.heads):
        part = slice(h * size, (h + 1) * size)
        logits = (q[:, part] @ k[:, part].T / size**0.5).masked_fill(~seen, -torch.inf)
        heads.append(logits.softmax(1) @ v[:, part])
    hidden = query + made.o_proj(torch.cat(heads, 1))
    n = F.layer_norm(hidden, (c.width,), made.norm_mlp.weight, made.norm_mlp.bias, c.eps)
    gate = made.gate_proj(n)
    hidden = hidden + made.down_proj(gate * gate.sigmoid() * made.up_proj(n))
    return made.output(hidden)
