"""Gated DeltaNet over packed training sequences: every question starts from the state of the media.

Attention layers keep the questions of a pack apart by their mask. A linear layer has no mask but a
state, so each question has to continue from a copy of the state that the shared part leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 16  # questions have about as many tokens; the stock chunk of 64 would be mostly padding


@dataclass(frozen=True)
class Segments:
    """Where the questions of a pack lie.

    Attributes
    ----------
    shared : int
        Tokens of the shared part, the same in all rows.
    rows : Tensor
        int64 (segments,): the row of each segment.
    index : Tensor
        int64 (segments, longest): columns of its tokens; the last column again behind its end.
    real : Tensor
        bool (segments, longest): True where `index` is a token of the segment.
    """

    shared: int
    rows: Tensor
    index: Tensor
    real: Tensor

    @staticmethod
    def from_mask(mask: Tensor) -> Segments:
        """Read them off the mask (batch, 1, length, length) of `packing.attention_mask`.

        A token whose previous visible token is not the one before it starts a segment, and that
        previous visible token ends the shared part.
        """
        seen = mask[:, 0]
        batch, length, _ = seen.shape
        at = torch.arange(length)
        before = seen & (at[None, :, None] > at[None, None, :])
        previous = torch.where(before, at, -1).amax(-1)
        starts = (previous != at - 1) & (previous >= 0)
        shared = int(previous[starts].max()) + 1 if bool(starts.any()) else length
        starts[:, shared : shared + 1] = True
        real = seen.sum(-1) > 1  # padding sees itself alone
        starts &= real & (at >= shared)
        rows, first = starts.nonzero(as_tuple=True)
        number = starts.cumsum(1) - 1  # of the segment within its row
        sizes = torch.zeros(batch, length, dtype=torch.long)
        sizes.scatter_add_(1, number.clamp(min=0), (real & (at >= shared)).long())
        lengths = sizes[rows, number[rows, first]]
        step = torch.arange(int(lengths.max()) if len(lengths) else 0)
        inside = step < lengths[:, None]
        index = (first[:, None] + step).minimum((first + lengths - 1)[:, None])
        return Segments(shared, rows, index, inside)


@contextmanager
def segmented(decoder: Any, mask: Tensor) -> Iterator[dict[str, Any]]:
    """Masks by layer type, for a decoder whose linear layers keep questions apart meanwhile."""
    layers = [layer.linear_attn for layer in decoder.layers if hasattr(layer, "linear_attn")]
    segments = Segments.from_mask(mask)
    for layer in layers:
        layer.forward = partial(_forward, layer, segments)
    try:
        yield {"full_attention": mask, "linear_attention": None}
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: Any, segments: Segments, hidden_states: Tensor, **unused: Any) -> Tensor:
    """What the stock forward pass gives for the shared part and each question by themselves."""
    mixed = layer.in_proj_qkv(hidden_states)
    beta = layer.in_proj_b(hidden_states).float().sigmoid()
    decay = F.softplus(layer.in_proj_a(hidden_states).float() + layer.dt_bias)
    decay = -layer.A_log.float().exp() * decay
    n, context = segments.shared, layer.conv_kernel_size - 1
    shared = mixed[:, :n]
    before = F.pad(shared, (0, 0, context, 0))
    out = mixed.new_zeros(*mixed.shape[:2], layer.num_v_heads, layer.head_v_dim).float()
    first, state = _rule(layer, before, beta[:, :n], decay[:, :n], None, 64)
    out[:, :n] = first
    if len(segments.rows):
        rows = segments.rows
        places = (rows[:, None], segments.index)
        inputs = torch.cat([before[rows, -context:], mixed[places]], 1)
        second, _ = _rule(layer, inputs, beta[places], decay[places], state[rows], CHUNK)
        real = segments.real
        filled = (rows[:, None].expand_as(real)[real], segments.index[real])
        out = out.index_put(filled, second[real])
    gate = layer.in_proj_z(hidden_states).reshape(-1, layer.head_v_dim)
    normed = layer.norm(out.reshape(-1, layer.head_v_dim).to(gate.dtype), gate)
    return layer.out_proj(normed.reshape(*mixed.shape[:2], -1))


def _rule(
    layer: Any, inputs: Tensor, beta: Tensor, decay: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Convolution and delta rule; `inputs` begins with the tokens that the convolution looks at.

    In float32: the triangular solve of the rule has no other form on CPUs.
    """
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    with torch.autocast("cpu", enabled=False):
        columns, weight = inputs.float().transpose(1, 2), layer.conv1d.weight.float()
        mixed = F.silu(F.conv1d(columns, weight, groups=len(weight))).transpose(1, 2)
        sizes = [layer.key_dim, layer.key_dim, layer.value_dim]
        query, key, value = (
            x.unflatten(-1, (-1, width))
            for x, width in zip(
                mixed.split(sizes, -1),
                (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim),
                strict=True,
            )
        )
        return torch_chunk_gated_delta_rule(
            query,
            key,
            value,
            g=decay.float(),
            beta=beta.float(),
            chunk_size=chunk,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
