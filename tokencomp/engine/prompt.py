"""The pass `read`: converts the arguments of a decoder call to spans, prompts and a row map.

Inside a compressed call, rows are aligned to the right ("left-padded"). Right-padded batches, as
most collators for training produce, are aligned at entry and restored afterwards.

Reducers that read the question must choose the same tokens whether a call contains the question
only, the question and its answer (training, scored choices), tokens generated so far (generation
without a cache) or draft tokens (assisted decoding).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokencomp.adapters.base import ENCODED, Adapter, MediaCall
from tokencomp.adapters.structure import feature_modality
from tokencomp.engine.call import Call, Noted, build_segments
from tokencomp.engine.rowmap import KeptSpan, Prompt, RowMap
from tokencomp.errors import AlreadyCompressedError, PaddingError, UnsupportedModelError
from tokencomp.plan.plan import Plan
from tokencomp.tokens.tokens import VisualSpan
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import shallow_copy

IGNORED = -100  # label of columns without loss, as in transformers


def read_prompt(
    adapter: Adapter,
    arguments: dict[str, Any],
    cache: Any,
    noted: Noted,
    plan: Plan,
    **options: Any,
) -> tuple[Call, Tensor]:
    """Read a prefill call, before anything is computed or changed.

    `arguments` are those of the decoder by name, with the 2-D padding mask as `attention_mask`; the
    `modalities` of `noted` are known; `options` are `by_column` and `prepared` of the `Call`.
    Returns the call, with the map of the uncompressed rows, the counts of the plan and the
    segments; and its uncompressed positions, int64, (3, B, L) for M-RoPE, else (B, L).
    """
    modalities, x = noted.modalities, arguments["inputs_embeds"]
    assert modalities is not None
    # `modalities` are of the caller's columns: other code may have dropped tokens in between.
    if x.shape[:2] != modalities.shape:
        raise _shortened(adapter, x.shape, modalities.shape)
    past = int(cache.get_seq_length()) if cache is not None else 0
    positions, text = read_positions(adapter, arguments, past)
    rows = positions[-3:].cpu().numpy() if adapter.mrope else None
    spans = adapter.spans(MediaCall(modalities, x, rows, adapter.body, noted.inputs or {}))
    if plan.has_item_budget:
        adapter.item_ends.warn_of_unknown(spans)
    row_map = _map(arguments, past, noted, spans, text)
    layers, mask = getattr(cache, "layers", None) or (), arguments.get("attention_mask")
    segments = build_segments(plan, len(adapter.layers), layers, mask, row_map)
    return Call(adapter, plan, spans, x.shape[1], segments, row_map, cache, **options), positions


def _shortened(adapter: Adapter, found: torch.Size, expected: torch.Size) -> AlreadyCompressedError:
    """The error for a prompt that other code has shortened."""
    if rate := getattr(adapter.top, "video_pruning_rate", 0):
        return AlreadyCompressedError(
            f"{type(adapter.top).__name__} drops video tokens itself (video_pruning_rate="
            f"{rate}). Set model.video_pruning_rate = 0, or run prompts with videos under "
            "handle.disabled(). Images are compressed in any case."
        )
    return AlreadyCompressedError(
        f"the decoder got {tuple(found[:2])} tokens for a prompt of {tuple(expected)}: something "
        "else already shortened it. Undo the other method before patch()."
    )


def _map(
    arguments: dict[str, Any],
    past: int,
    noted: Noted,
    spans: list[list[VisualSpan]],
    text: Tensor | None,
) -> RowMap:
    """The map of a prefill: real rows, packed prompts, and ends of questions.

    `past`: length of the cache. `text`: positions of the caller, (B, L) or (1, L), which restart at
    every packed prompt.
    """
    shape, mask = arguments["inputs_embeds"].shape[:2], arguments.get("attention_mask")
    real, starts = real_columns(mask, shape), None
    if mask is None and past == 0:  # otherwise transformers does not infer packed prompts
        starts = packed_starts(None if text is None else text.cpu())
        starts = starts or starts_from_lengths(arguments.get("cu_seq_lens_q"), *shape)
    # How many last columns are drafts or the answer so far: these do not vote on what is kept.
    if noted.columns is None:
        # `logits_to_keep` longer than the text at the end includes visual columns, so it does not
        # count draft tokens.
        tail = min((shape[1] - row[-1].stop for row in spans if row), default=0)
        generated = noted.drafts if noted.drafts <= tail else 0
    else:
        generated = max(0, past + shape[1] - noted.columns)
    prompts = build_prompts(real, spans, starts, noted.labels, generated)
    # Left-padded, or without padding: rows are columns. Else real columns move to the right end.
    left_padded = (np.diff(real.numpy().astype(np.int8), axis=1) >= 0).all()
    if left_padded:
        return RowMap.of_prompt(shape[1], real.numpy().sum(1).tolist(), spans, prompts)
    return aligned_map(real, spans, prompts)


def read_positions(
    adapter: Adapter, arguments: Mapping[str, Any], past: int
) -> tuple[Tensor, Tensor | None]:
    """Positions of an uncompressed decoder call, and positions that separate packed prompts.

    The former are (3, B, L) for M-RoPE, else (B, L); the latter (B, L) or (1, L), or None if the
    caller passed none.
    """
    x, positions = arguments["inputs_embeds"], arguments.get("position_ids")
    batch, n = x.shape[:2]
    # As transformers counts without positions: on from the length of the cache.
    if positions is None:
        ids = torch.arange(past, past + n, device=x.device)[None]
        return ids.expand(*((adapter.mrope_rows,) if adapter.mrope else ()), batch, -1), None
    if not adapter.mrope:
        return positions.expand(batch, -1), positions
    if positions.ndim == 2:
        positions = positions[None]
    # A row of text positions can precede those of the rotary embedding (time, height, width).
    rows = adapter.mrope_rows
    text = positions[0] if positions.shape[0] == rows + 1 else None
    return positions[-rows:].expand(rows, batch, -1), text


# -- real columns, prompts and questions ---------------------------------------------------------


def real_columns(mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Columns of this call that the attention mask shows, bool on the CPU, shape (B, L)."""
    batch, width = shape
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool)
    real = mask[:, -width:].bool().cpu()
    empty = np.flatnonzero(~real.numpy().any(1))
    if len(empty):
        raise PaddingError(
            f"sample {empty[0]}: attention_mask hides all of its {width} tokens. Every sample of a "
            "prompt with images or videos needs a token; leave the sample out of the batch."
        )
    return real


def aligned_map(real: Tensor, spans: list[list[VisualSpan]], prompts: list[list[Prompt]]) -> RowMap:
    """The map of a call that is not left-padded: its real columns, aligned to the right.

    Columns hidden by the attention mask are removed, which equals masking them. `real` (B, L), on
    the CPU, is False there; `spans` and `prompts` count columns.
    """
    columns = [row.nonzero()[:, 0] for row in real]
    width = max(c.numel() for c in columns)
    # Real columns 0 1 3 of a sample in a batch whose longest has 4: shift 1, rows · 0 1 3.
    shifts = [width - c.numel() for c in columns]
    # row_of[b][c]: row of the first real token from column c on
    ends = nn.functional.pad(real.long().cumsum(1), (1, 0))
    row_of = [(row + shift).tolist() for row, shift in zip(ends, shifts, strict=True)]
    kept = []
    for b, row in enumerate(spans):
        for span in row:
            _check_visible(real[b, span.start : span.stop], b, span)
        kept.append([KeptSpan(s, row_of[b][s.start], s.length) for s in row])
    moved = [
        [Prompt(at[p.start], at[p.stop], at[p.question_stop]) for p in row]
        for at, row in zip(row_of, prompts, strict=True)
    ]
    held = torch.stack([nn.functional.pad(c, (s, 0)) for c, s in zip(columns, shifts, strict=True)])
    lengths = [c.numel() for c in columns]
    return RowMap(width, real.shape[1] - width, held, lengths=lengths, spans=kept, prompts=moved)


def _check_visible(real: Tensor, sample: int, span: VisualSpan) -> None:
    hidden = real.numel() - int(real.sum())
    if hidden:
        raise PaddingError(
            f"sample {sample}: attention_mask hides {hidden} of the {span.length} tokens of the "
            f"{span.modality} that begins at column {span.start}. It may hide padding and text; "
            "give whole images and videos, or leave them out of the prompt."
        )


def build_prompts(
    real: Tensor,
    spans: list[list[VisualSpan]],
    starts: list[list[int]] | None = None,
    labels: Tensor | None = None,
    generated: int = 0,
) -> list[list[Prompt]]:
    """The prompts of every sample, in columns of the caller's batch.

    `real` (B, L), on the CPU, is False at columns that the attention mask hides. `starts` are first
    columns of packed prompts of every sample; None: one prompt per sample. The answer begins with
    the last run of trained `labels` (B, L), or else with the last `generated` columns, which were
    generated or drafted.
    """
    labels = None if labels is None or labels.shape != real.shape else labels.cpu()
    rows = []
    for b, row in enumerate(real.numpy()):
        columns = np.flatnonzero(row)
        first, stop = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        # Starts of packed prompts inside of the real columns; without any, one prompt.
        bounds = [first, *(s for s in (starts[b] if starts else ()) if first < s < stop), stop]
        prompts = []
        for begin, end in itertools.pairwise(bounds):
            # The question ends where the answer begins, but not before the last span.
            visual = max((s.stop for s in spans[b] if begin <= s.start < end), default=begin)
            answer = end - generated
            if labels is not None:
                answer = answer_start(labels[b], begin, end)
            prompts.append(Prompt(begin, end, max(answer, visual)))
        rows.append(prompts)
    return rows


def answer_start(labels: Tensor, start: int, stop: int) -> int:
    """First column of the last run of trained labels (L,) in `start … stop - 1`, or `stop`."""
    trained = (labels[start:stop] != IGNORED).nonzero()[:, 0]
    if not trained.numel():
        return stop
    # Labels · 5 6 · · 7 8 (· is untrained): two answers, the last begins at column 5.
    gaps = (trained.diff() != 1).nonzero()[:, 0]
    return start + int(trained[int(gaps[-1]) + 1] if gaps.numel() else trained[0])


def packed_starts(text_positions: Tensor | None) -> list[list[int]] | None:
    """First columns of packed prompts: positions that are not consecutive, as in transformers.

    For every row of the given positions, (B, L) or (1, L) on the CPU; None if no row is packed.
    """
    if text_positions is None:
        return None
    # Positions 0 1 2 0 1: a break before column 3, where the second prompt starts.
    breaks = text_positions.diff(dim=-1) != 1
    if not bool(breaks.any()):
        return None
    return [[0, *(int(c) + 1 for c in row.nonzero()[:, 0])] for row in breaks]


def starts_from_lengths(cumulative: Any, batch: int, width: int) -> list[list[int]] | None:
    """First columns of packed prompts from `cu_seq_lens_q` (prompts + 1,), over all rows."""
    if cumulative is None:
        return None
    # Bounds 0 3 8 12 over two rows of 8 columns: starts 0 and 3 in row 0, 0 and 4 in row 1.
    bounds = torch.as_tensor(cumulative).tolist()
    rows = [
        [c - b * width for c in bounds if b * width <= c < (b + 1) * width] for b in range(batch)
    ]
    return rows if any(len(row) > 1 for row in rows) else None


# -- decoders that put features in place themselves, as Chameleon's does -------------------------
# In other models the body does that. These decoders get token ids and pixels, and would insert
# features after the hooks that compress.


@dataclass
class _Reached(Exception):
    """Ends a decoder call at its first layer; holds the input of the layer."""

    hidden: Tensor


def with_embeddings(decoder: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a decoder call with embeddings instead of token ids and pixels.

    A shallow copy of the decoder runs up to its first layer, so that the tower runs once.
    """

    def reach(hidden_states: Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Reached(hidden_states)

    clone, first = shallow_copy(decoder), shallow_copy(decoder.layers[0])
    first.forward, first.gradient_checkpointing = reach, False
    clone._modules["layers"] = nn.ModuleList([first])
    call = {k: v for k, v in arguments.items() if k not in (*compat.CACHE_NAMES, "use_cache")}
    try:
        type(clone).forward(clone, **call, use_cache=False)
    except _Reached as reached:
        hidden = reached.hidden
    else:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} puts features in place itself, and its layers are not run "
            "in order, so nothing can be dropped before them. Run it without patch()."
        )
    media = {name for name in arguments if feature_modality(name) is not None} | {ENCODED}
    rest = {name: None if name in media else value for name, value in arguments.items()}
    return {**rest, "input_ids": None, "inputs_embeds": hidden}
