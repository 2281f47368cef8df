"""Reads a decoder call with visual tokens: positions, spans, prompts, and cache segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.call import Call
from tokencomp.engine.call.generate import GenerateCall
from tokencomp.engine.call.refusals import check_prefill
from tokencomp.engine.context.visual_window import check_window
from tokencomp.engine.rows.layout import RowLayout, full_layout
from tokencomp.engine.rows.padding import aligned_layout, left_padded, real_columns
from tokencomp.engine.rows.question import (
    build_prompts,
    packed_starts,
    starts_from_lengths,
)
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.engine.stage.segments import build_segments
from tokencomp.errors import UnknownGridError
from tokencomp.plan.plan import Plan
from tokencomp.tokens.spans import VisualSpan, numbered


@dataclass(frozen=True)
class PrefillCall:
    """A decoder call that carries visual tokens, and what the calls around it said.

    Attributes
    ----------
    arguments
        Arguments of the decoder by name, with the 2-D mask of padding as `attention_mask`.
    kinds : Tensor of int8 on the CPU, shape (B, L)
        See `Adapter.kinds`.
    cache
        The KV cache, or None.
    inputs
        Arguments of the model's body by name.
    labels : Tensor of int64, shape (B, L), or None
        Labels of a training call.
    draft
        Number of draft tokens at the end of the call, where it is not known from `generate`.
    """

    arguments: dict[str, Any]
    kinds: Tensor
    cache: Any
    inputs: Mapping[str, Any]
    labels: Tensor | None
    draft: int


class PromptReader:
    """Turns a prefill call into a `ForwardPass`, before anything is computed or changed.

    Parameters
    ----------
    running
        The `generate` call that runs, if one does.
    """

    def __init__(self, adapter: Adapter, running: GenerateCall) -> None:
        self.adapter, self.running = adapter, running

    def read(self, call: PrefillCall, plan: Plan) -> tuple[ForwardPass, Tensor]:
        """Read a prefill call.

        Returns
        -------
        ForwardPass
            With the layout and the segments of the call; no stage has run.
        Tensor of int64
            Positions of the uncompressed call, (3, B, L) for M-RoPE, else (B, L).

        Raises
        ------
        TokenCompError
            The call cannot be compressed, or not exactly.
        """
        adapter, arguments, cache = self.adapter, call.arguments, call.cache
        x, mask = arguments["inputs_embeds"], arguments.get("attention_mask")
        layered = bool(plan.layer_stages)
        check_prefill(adapter, arguments, call.kinds, layered)
        positions, text = read_positions(adapter, arguments, cache)
        rows = positions[-3:].cpu() if adapter.mrope else None
        found = adapter.spans(Call(call.kinds, x, rows, adapter.body, call.inputs))
        spans = [numbered(row) for row in found]
        check_grids(plan, spans)
        check_window(adapter, call.kinds, cache)
        layout = self._layout(call, spans, text)
        forward = ForwardPass(adapter, plan, spans, layout, x.shape[1])
        forward.segments = build_segments(plan, len(adapter.layers), cache, mask, x.shape[1])
        return forward, positions

    def _layout(
        self, call: PrefillCall, spans: list[list[VisualSpan]], text: Tensor | None
    ) -> RowLayout:
        """Where the tokens of a prefill stand: real columns, prompts, and the end of questions.

        Parameters
        ----------
        text : Tensor of int64, shape (B, L) or (1, L), or None
            Positions of the caller that begin again in every packed prompt.
        """
        shape = call.arguments["inputs_embeds"].shape[:2]
        mask, past = call.arguments.get("attention_mask"), cached_length(call.cache)
        real, starts = real_columns(mask, shape), None
        if mask is None and past == 0:  # the only case in which transformers looks for packing
            starts = packed_starts(None if text is None else text.cpu())
            starts = starts or starts_from_lengths(call.arguments.get("cu_seq_lens_q"), *shape)
        generated = self.running.generated(past, shape[1])
        if generated is None:
            # `logits_to_keep` beyond the text at the end cannot be a count of draft tokens: the
            # caller wants logits of visual columns.
            tail = min((shape[1] - row[-1].stop for row in spans if row), default=0)
            generated = call.draft if call.draft <= tail else 0
        prompts = build_prompts(real, spans, starts, call.labels, generated)
        if left_padded(real):
            return full_layout(shape[1], real.numpy().sum(1).tolist(), spans, prompts)
        return aligned_layout(real, spans, prompts)


def check_grids(plan: Plan, spans: list[list[VisualSpan]]) -> None:
    """Refuse spans of unknown grid where a reducer of the plan reads places in it.

    Raises
    ------
    UnknownGridError
    """
    unknown = next((s for row in spans for s in row if not s.grid_known), None)
    for stage in plan.stages:
        if unknown is None or not stage.reducer.needs_grid:
            continue
        if stage.amount is None and stage.fraction_of(unknown.kind) == 1:
            continue
        raise UnknownGridError(
            f"reducer {stage.reducer.name!r} reads places in the grid of an {unknown.kind}, but "
            f"nothing tells how the {unknown.length} tokens from column {unknown.start} on lie "
            "in the picture. Use a reducer that reads features alone, such as 'condiv', "
            "'divprune', 'merge' or 'uniform'."
        )


def cached_length(cache: Any) -> int:
    """Logical tokens that a cache holds; 0 where there is none."""
    return int(cache.get_seq_length()) if cache is not None else 0


def read_positions(
    adapter: Adapter, arguments: Mapping[str, Any], cache: Any
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
        start = cached_length(cache)
        own = torch.arange(start, start + n, device=x.device)[None]
        return own.expand(*((adapter.mrope_rows,) if adapter.mrope else ()), batch, -1), None
    if not adapter.mrope:
        return positions.expand(batch, -1), positions
    if positions.ndim == 2:
        positions = positions[None]
    # A row before those of the rotary embedding (time, height and width) counts tokens.
    rows = adapter.mrope_rows
    text = positions[0] if positions.shape[0] == rows + 1 else None
    return positions[-rows:].expand(rows, batch, -1), text
