"""The passes `score` and `choose`: a stage passes tokens to a reducer and keeps its choice.

`enter` runs the stages before the first decoder layer, and `run_stage` one stage anywhere:

    x, map ─► score ─► _cuts ─► patches_of ─► choose_patches ─► keep ─► x', map'
              (what    (counts   (all spans    (as in every      (`RowMap.keep`,
              it needs) of spans) as a batch)  engine)           gathered by `take`)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.engine.call import Call
from tokencomp.engine.frames import frames_before
from tokencomp.engine.gather import take
from tokencomp.engine.rowmap import Chosen, RowMap, move_tables, text_values
from tokencomp.engine.scores import StageScores, rater_weights
from tokencomp.engine.tower.survivors import surviving_rows
from tokencomp.plan.plan import Stage
from tokencomp.reducers.choice import Cut, Patches, cell_table, choose_patches, needs_cells
from tokencomp.tokens.signals import FRAMES, NORM, QUERY, Attention, TowerSignal
from tokencomp.tokens.stacks import rows_of, starts_of
from tokencomp.tokens.tokens import Kept

# -- stages -------------------------------------------------------------------------------------


def enter(call: Call, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the stages before the first decoder layer, on x (B, L, d) and positions (…, B, L).

    Returns both for the n kept rows, and the column of the caller's batch of every row, int64 (B,
    n); None if all rows are kept in place.
    """
    started, columns = time.perf_counter(), call.map.columns
    if columns is not None:  # the batch is not left-padded: align real columns to the right
        call.map = call.map.to(x.device)
        tensors = [x, positions.to(x.device)]
        x, positions = take(tensors, columns.to(x.device), [1, -1], call.map.mask(x.device))
    if call.plan.tower is not None:  # first, so that dropped tokens are not scored
        survivors = surviving_rows(x, call.map, call.plan)
        x, positions = _keep(call, *survivors, [x, positions], [1, -1])
        call.survivors = call.map
        if call.plan.tower.decides:
            call.note_entering()
    signals = [s for s in call.plan.needs if isinstance(s, Attention)]
    signals = [s for s in signals if s.modalities & call.modalities]
    if signals:
        call.scores = StageScores(call.adapter.layers)
        if any(s.rows == "raters" for s in signals):
            call.scores.raters = rater_weights(x, call.map)
    # A stage at entry that scores by attention reads queries and keys of layer 0.
    stage, arguments = call.plan.entry, {}
    if stage is not None and any(s in stage.needs for s in signals):
        tables = call.adapter.rotary_tables(x, positions, layer=0)
        ids = None if call.adapter.mrope else positions
        arguments = {"position_embeddings": tables, "position_ids": ids}
    call.stage_seconds = time.perf_counter() - started
    if stage is not None:
        x, positions = run_stage(call, stage, [x, positions], [1, -1], arguments)
    call.segments[0].new = call.map
    return x, positions, call.map.columns


def run_stage(
    call: Call,
    stage: Stage,
    tensors: list[Tensor],
    dims: list[int],
    arguments: Mapping[str, Any],
) -> list[Tensor]:
    """Run a stage: the first of `tensors` is x (B, n, d), the others are gathered with it.

    `arguments` are those of the next layer, with positions for its attention scores.
    """
    started, x = time.perf_counter(), tensors[0]
    if stage.layer:  # layers can be on several devices
        call.map = call.map.to(x.device)
    # Score by the next layer, unless an earlier layer has scored for this stage.
    if call.scores is not None and stage.layer not in call.scores.spans:
        past = call.segment_of[stage.layer].past
        for s in (s for s in stage.needs if isinstance(s, Attention)):
            if s.modalities & call.modalities and (s.layer == "next" or not stage.layer):
                call.scores.add(stage.layer, x, arguments, s, call.map, call.cache, past)
    counts, chosen, kept = choose(call, stage, x)
    tensors = _keep(call, counts, chosen, kept, tensors, dims)
    call.kept.append(call.map)
    call.stage_seconds += time.perf_counter() - started
    return tensors


def _keep(
    call: Call,
    counts: list[list[int]],
    chosen: Chosen,
    kept: Kept | None,
    tensors: list[Tensor],
    dims: list[int],
) -> list[Tensor]:
    """Update the map of the call after a choice, and gather the kept rows of all tensors."""
    device, before = tensors[0].device, call.map
    call.map, index, flat = before.keep(counts, chosen, kept, device)
    mask = call.map.mask(device)
    if call.scores is not None:
        call.scores.follow(before, call.map, index, device)
    tensors = take([t.to(device) for t in tensors], index, dims, mask)
    if kept is not None and kept.features is not None and flat is not None:
        # Overwrite the gathered rows with merged features.
        tensors[0].flatten(0, 1).index_copy_(0, flat, kept.features.to(tensors[0]))
    return tensors


# -- the choice ---------------------------------------------------------------------------------


def choose(call: Call, stage: Stage, x: Tensor) -> tuple[list[list[int]], Chosen, Kept | None]:
    """Let the reducer of a stage choose tokens of every span.

    Returns, per sample and span, the number of kept tokens, including text between the frames of a
    video; the spans that keep some of their tokens; and the reducer's choice over all of these
    spans, concatenated, or None if there are none.
    """
    counts, cuts = _cuts(call, stage)
    scores = texts = None
    # Scores serve one stage, and go even if no span loses a token.
    if call.scores is not None:
        scores = call.scores.spans.pop(stage.layer, None)
        texts = call.scores.texts.pop(stage.layer, None)
    frames = frames_before(call, x) if FRAMES in stage.needs else None
    if not cuts:
        return counts, [], None
    patches = patches_of(call, stage, x, cuts, scores)
    tokens, row_map = patches.tokens, call.map
    if frames is not None:
        tokens.frames = [frames[b][j] for b, j in tokens.span_ids]
    if QUERY in stage.needs:
        tokens.queries = _of_prompts(row_map, text_values(x, row_map), tokens.span_ids, x)
    if texts is not None:
        tokens.query_scores = _of_prompts(row_map, texts, tokens.span_ids, x)
    tokens.norm = call.adapter.final_norm if NORM in stage.needs else None
    return counts, [cut.span_id for cut in cuts], choose_patches(patches, stage)


def _cuts(call: Call, stage: Stage) -> tuple[list[list[int]], list[Cut]]:
    """Number of kept tokens of every span, as in `choose`; and the spans that lose tokens."""
    counts, cuts, order = [], [], call.plan.stages.index(stage)
    for b, spans in enumerate(call.map.spans):
        counts.append([0] * len(spans))
        for j, kept in enumerate(spans):
            span, visual = kept.span, call.counts[b][j][order]
            counts[b][j], ends = visual + len(span.text), call.map.ends_question(b, kept)
            if counts[b][j] >= kept.count or not (counts[b][j] or ends):
                continue  # no need for a reducer
            fraction = stage.fraction_of(span.modality, call.shares[b][j])
            cut = Cut.of(span, kept.count, visual, fraction, ends, (b, j))
            # The last token of a question predicts the answer, and stays at any ratio.
            if cut.keep > counts[b][j]:  # the last token of a question
                counts[b][j], call.counts[b][j][order] = cut.keep, 1
            cuts.append(cut)
    return counts, cuts


def patches_of(
    call: Call, stage: Stage, x: Tensor, cuts: list[Cut], scores: Tensor | None
) -> Patches:
    """The patches of the spans that lose tokens, with what the reducer needs of each.

    x (B, n, d) are hidden states of all rows; `scores` (kept visual tokens,) those of the tokens of
    all spans of all samples. Index tables are built on the host and move to the device in one copy:

        column           0  1  2  3  4  5  6  7  8      span at columns 2 … 6, patch 1 dropped
        row              0  1  2  .  3  4  5  6  7
        token                  0     1  2  3            of the stage
        table "rows"           2     3  4  5            flat row (sample · rows + row)
        table "shift"         -2    -2 -2 -2            column + shift = number of the token
        numbers                0     2  3  4            in the uncompressed spans
    """
    row_map, flat, numbers = call.map, x.flatten(0, 1), None
    tables, adjacent = _host_tables(row_map, cuts, scores)
    moved = move_tables(tables, x.device)
    # Neighbouring rows, as of one image in a batch of one, are a view and no copy.
    features = flat.index_select(0, moved["rows"]) if adjacent is None else flat[adjacent]
    values: dict[str | TowerSignal, Tensor] = {}
    if row_map.weights is not None:
        values["weights"] = row_map.weights.flatten().index_select(0, moved["rows"])
    if scores is not None:
        scores = scores.to(x.device)
        values["scores"] = scores.index_select(0, moved["scored"]) if "scored" in moved else scores
    if row_map.columns is not None and "shift" in moved:
        numbers = row_map.columns.flatten().index_select(0, moved["rows"]) + moved["shift"]
    # The tower has a value for every token of the uncompressed span.
    for signal in (s for s in stage.needs if isinstance(s, TowerSignal)):
        by_span = [call.tower_signals[signal][b][j] for b, j in (cut.span_id for cut in cuts)]
        every = torch.cat(by_span).to(x.device)  # of the uncompressed spans
        values[signal] = every if numbers is None else every.index_select(0, numbers)
    return Patches.of(cuts, features, numbers, moved.get("cells"), values)


def _host_tables(
    row_map: RowMap, cuts: list[Cut], scores: Tensor | None
) -> tuple[dict[str, Any], slice | None]:
    """Index tables for `patches_of` by name; and a slice of the flat rows, if contiguous.

    "cells" are those of `Cut`. "scored" indexes the scores.
    """
    spans = [row_map.spans[b][j] for b, j in (cut.span_id for cut in cuts)]
    starts = [
        kept.start + cut.span_id[0] * row_map.rows for kept, cut in zip(spans, cuts, strict=True)
    ]
    lengths = [kept.count for kept in spans]
    stop = starts[-1] + lengths[-1]
    adjacent = slice(starts[0], stop) if stop - starts[0] == sum(lengths) else None
    # Whether an earlier stage has dropped tokens, so that token i is not patch i of its span.
    missing = row_map.columns is not None and any(not kept.whole for kept in spans)
    tables: dict[str, Any] = {}
    if adjacent is None or missing or row_map.weights is not None:
        tables["rows"] = np.concatenate(
            [np.arange(n) + at for at, n in zip(starts, lengths, strict=True)]
        )
    if missing:
        firsts = starts_of([kept.span.length for kept in spans])[:-1]
        tables["shift"] = np.repeat(firsts - [kept.span.start for kept in spans], lengths)
    if missing or needs_cells(cuts):
        tables["cells"] = cell_table(cuts)
    # Spans that keep all tokens have scores too, which the reducer does not see.
    if scores is not None and len(scores) > sum(lengths):
        firsts = starts_of([s.count for spans in row_map.spans for s in spans])
        before = starts_of([len(spans) for spans in row_map.spans])  # spans of earlier samples
        numbers = [before[b] + j for b, j in (cut.span_id for cut in cuts)]
        tables["scored"] = rows_of(firsts, numbers)
    return tables, adjacent


def _of_prompts(
    row_map: RowMap, texts: list[list[Tensor]], chosen: Chosen, x: Tensor
) -> list[Tensor]:
    """Values of the text of its prompt for every span; spans of one prompt share one tensor."""
    moved = [[text.to(x.device) for text in sample] for sample in texts]
    values = []
    for b, j in chosen:
        kept = row_map.spans[b][j]
        prompt = next(i for i, p in enumerate(row_map.prompts[b]) if p.holds(kept))
        values.append(moved[b][prompt])
    return values
