"""Reads a decoder call with visual tokens: positions, spans, prompts, and cache segments."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.call import Call
from tokencomp.engine.call.state import CallState
from tokencomp.engine.rows.layout import RowLayout, full_layout
from tokencomp.engine.rows.prompts import (
    aligned_layout,
    build_prompts,
    left_padded,
    packed_starts,
    real_columns,
    starts_from_lengths,
)
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.engine.stage.segments import build_segments
from tokencomp.errors import AlreadyCompressedError, OptionError, UnknownGridError
from tokencomp.plan.plan import Plan
from tokencomp.tokens.spans import VisualSpan, numbered
from tokencomp.torchlib import compat


def read_prompt(
    adapter: Adapter, arguments: dict[str, Any], cache: Any, state: CallState, plan: Plan
) -> tuple[ForwardPass, Tensor]:
    """Turn a prefill call into a `ForwardPass`, before anything is computed or changed.

    What cannot be compressed, or not exactly, is refused.

    Parameters
    ----------
    arguments
        Arguments of the decoder by name, with the 2-D mask of padding as `attention_mask`.
    state
        What the calls around it said; its `modalities` are known.

    Returns
    -------
    ForwardPass
        With the layout and the segments of the call; no stage has run.
    Tensor of int64
        Positions of the uncompressed call, (3, B, L) for M-RoPE, else (B, L).
    """
    modalities, x, mask = (
        state.modalities,
        arguments["inputs_embeds"],
        arguments.get("attention_mask"),
    )
    assert modalities is not None
    if x.shape[:2] != modalities.shape:
        if rate := getattr(adapter.top, "video_pruning_rate", 0):
            raise AlreadyCompressedError(
                f"{type(adapter.top).__name__} drops video tokens itself (video_pruning_rate="
                f"{rate}). Set model.video_pruning_rate = 0, or run prompts with videos under "
                "handle.disabled(). Images are compressed in any case."
            )
        raise AlreadyCompressedError(
            f"the decoder got {tuple(x.shape[:2])} tokens for a prompt of "
            f"{tuple(modalities.shape)}: something else already shortened it. Undo the other "
            "method before patch()."
        )
    if plan.layer_stages and compat.recomputed(adapter.layers[0]):
        check_recomputation()
    past = int(cache.get_seq_length()) if cache is not None else 0
    positions, text = read_positions(adapter, arguments, past)
    rows = positions[-3:].cpu().numpy() if adapter.mrope else None
    found = adapter.spans(Call(modalities, x, rows, adapter.body, state.inputs or {}))
    spans = [numbered(row) for row in found]
    unknown = [span for row in spans for span in row if not span.grid_known]
    if unknown:
        check_grids(plan, unknown)
    layout = _layout(arguments, past, state, spans, text)
    forward = ForwardPass(adapter, plan, spans, layout, x.shape[1])
    forward.cache = cache
    layers = getattr(cache, "layers", ())
    forward.segments = build_segments(plan, len(adapter.layers), layers, mask, x.shape[1])
    return forward, positions


def _layout(
    arguments: dict[str, Any],
    past: int,
    state: CallState,
    spans: list[list[VisualSpan]],
    text: Tensor | None,
) -> RowLayout:
    """Where the tokens of a prefill stand: real columns, prompts, and the end of questions.

    The cache holds `past` logical tokens. `text` are positions of the caller, (B, L) or (1, L),
    that begin again in every packed prompt.
    """
    shape, mask = arguments["inputs_embeds"].shape[:2], arguments.get("attention_mask")
    real, starts = real_columns(mask, shape), None
    if mask is None and past == 0:  # the only case in which transformers looks for packing
        starts = packed_starts(None if text is None else text.cpu())
        starts = starts or starts_from_lengths(arguments.get("cu_seq_lens_q"), *shape)
    if state.columns is None:
        # `logits_to_keep` beyond the text at the end cannot be a count of draft tokens: the
        # caller wants logits of visual columns.
        tail = min((shape[1] - row[-1].stop for row in spans if row), default=0)
        generated = state.drafts if state.drafts <= tail else 0
    else:
        generated = max(0, past + shape[1] - state.columns)
    prompts = build_prompts(real, spans, starts, state.labels, generated)
    if left_padded(real):
        return full_layout(shape[1], real.numpy().sum(1).tolist(), spans, prompts)
    return aligned_layout(real, spans, prompts)


def check_recomputation() -> None:
    """Refuse stages between layers where the backward pass would run them once more."""
    if compat.recomputes_hooks():
        raise OptionError(
            "gradient checkpointing with tokens dropped between layers: this transformers release "
            "would drop them again in the backward pass. Use transformers >= 5.23, an entry "
            "reducer, or model.gradient_checkpointing_disable()."
        )


def check_grids(plan: Plan, spans: list[VisualSpan]) -> None:
    """Refuse spans, all of unknown grid, where a reducer of the plan reads places in it."""
    for span, stage in itertools.product(spans, plan.stages):
        if stage.reducer.grid == "any":
            continue
        if stage.budget is None and stage.fraction_of(span.modality) == 1:
            continue
        raise UnknownGridError(
            f"reducer {stage.reducer.name!r} reads places in the grid of an {span.modality}, but "
            f"nothing tells how the {span.length} tokens from column {span.start} on lie "
            "in the picture. Use a reducer that reads features alone, such as 'condiv', "
            "'divprune', 'bipartite' or 'uniform'."
        )


def read_positions(
    adapter: Adapter, arguments: Mapping[str, Any], past: int
) -> tuple[Tensor, Tensor | None]:
    """Positions of an uncompressed decoder call, and those that distinguish packed prompts.

    Returns
    -------
    Tensor of int64
        (3, B, L) for M-RoPE, else (B, L).
    Tensor of int64, or None
        (B, L) or (1, L); None where the caller passed none.
    """
    x, positions = arguments["inputs_embeds"], arguments.get("position_ids")
    batch, n = x.shape[:2]
    if positions is None:
        own = torch.arange(past, past + n, device=x.device)[None]
        return own.expand(*((adapter.mrope_rows,) if adapter.mrope else ()), batch, -1), None
    if not adapter.mrope:
        return positions.expand(batch, -1), positions
    if positions.ndim == 2:
        positions = positions[None]
    # A row before those of the rotary embedding (time, height and width) counts tokens.
    rows = adapter.mrope_rows
    text = positions[0] if positions.shape[0] == rows + 1 else None
    return positions[-rows:].expand(rows, batch, -1), text
