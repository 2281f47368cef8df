"""The passes `score` and `choose`: a stage passes tokens to a reducer and keeps its choice.

`enter` runs the stages before the first decoder layer, and `run_stage` one stage anywhere:

    x, map ─► score ─► tokens_of ─► reducer ─► keep_last ─► merge_rest ─► keep ─► x', map'
              (what    (all spans   (`Kept`)   (a question   (merge=True)  (`RowMap.keep`,
              it needs) as a batch)            ends in it)                 gathered by `take`)
                                    └──── `choose_patches` ────────────┘
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokencomp.engine.call import Call
from tokencomp.engine.gather import take
from tokencomp.engine.memory import Entered
from tokencomp.engine.rowmap import KeptSpan, RowMap, move_tables, text_values
from tokencomp.engine.scores import StageScores, rater_weights
from tokencomp.engine.weights import merge_rest
from tokencomp.errors import SpanError
from tokencomp.plan.plan import Plan, Stage
from tokencomp.reducers.base import reduced
from tokencomp.tokens.signals import FRAMES, NORM, QUERY, Attention, TowerSignal
from tokencomp.tokens.stacks import rows_of, starts_of
from tokencomp.tokens.tokens import Kept, Tokens

Chosen = list[tuple[int, int]]  # (sample, span) of the spans from which a reducer chooses

# -- stages -------------------------------------------------------------------------------------


def enter(call: Call, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the stages before the first decoder layer, on x (B, L, d) and positions (…, B, L).

    Returns
    -------
    x, positions
        Of the n kept rows.
    columns : Tensor of int64, shape (B, n), or None
        Column of the caller's batch of every row; None if all rows are kept in place.
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

    Returns
    -------
    counts
        Per sample, per span: number of kept tokens, including text between the frames of a video.
    chosen
        Spans of which the reducer chose some tokens, but not all.
    kept
        Its choice over all of these spans, concatenated; None if there are none.
    """
    counts, cuts = _cuts(call, stage)
    scores = texts = None
    if call.scores is not None:
        scores = call.scores.spans.pop(stage.layer, None)
        texts = call.scores.texts.pop(stage.layer, None)
    frames = frames_before(call, x) if FRAMES in stage.needs else None
    if not cuts:
        return counts, [], None
    # The reducer sees the patches of these spans as one batch.
    tokens, features, patches, fixed = tokens_of(call, stage, x, cuts, scores, texts)
    if frames is not None:
        tokens.frames = [frames[b][j] for b, j in tokens.span_ids]
    final = [c.ends and c.roles[-1] == PATCH for c in cuts if (c.roles == PATCH).any()]
    kept = choose_patches(call, stage, tokens, final) if tokens.grids else Kept(tokens.table([]))
    if patches is not None and fixed is not None:  # from a choice among patches to one among all
        kept = kept.with_fixed(features, patches, fixed)
    return counts, [(c.sample, c.number) for c in cuts], kept


def choose_patches(call: Call, stage: Stage, tokens: Tokens, final: Sequence[bool]) -> Kept:
    """The choice of a stage among patches, with the options of the stage.

    `final`: for every span of `tokens`, whether a question ends in its last patch.
    """
    from tokencomp.kernels.dispatch import exact

    with exact(tokens.features, stage.reducer.traits.batched):
        kept = reduced(stage.reducer, tokens)
        if any(final):
            kept = keep_last(kept, tokens, final)
        # Average dropped patches into kept ones.
        if stage.merge:
            shares = [call.shares[b][j] for b, j in tokens.span_ids]
            fractions = [*map(stage.fraction_of, tokens.modalities, shares)]
            merging = [*map(stage.merges, tokens.modalities, fractions)]
            if any(merging):
                kept = merge_rest(tokens, kept, merging, stage.reducer.name)
    return kept


def keep_last(kept: Kept, tokens: Tokens, final: Sequence[bool]) -> Kept:
    """Keep the final patch of every span for which `final` is true.

    It takes the place of the kept patch with the highest number. Its row predicts the next token.
    """
    spans = np.flatnonzero(final)
    at = tokens.table(np.cumsum(tokens.budgets)[spans] - 1)
    last = tokens.table(np.cumsum(tokens.lengths)[spans] - 1)
    rows, features, weights = kept.patches.to(tokens.device), kept.features, kept.weights
    same = rows[at] == last
    if features is not None:
        new = torch.where(same[:, None], features[at], tokens.features[last].to(features))
        features = features.index_copy(0, at, new)
    if weights is not None:
        new = torch.where(same, weights[at], tokens.all_weights()[last].to(weights))
        weights = weights.index_copy(0, at, new)
    return Kept(rows.index_copy(0, at, last), features, weights)


# -- what the reducer sees ----------------------------------------------------------------------

PATCH, FIXED, DROPPED = range(3)  # roles of tokens


class Cut(NamedTuple):
    """A span of which a stage drops tokens.

    Attributes
    ----------
    sample, number
        Its sample, and its number in the sample.
    kept
        Its tokens before the stage.
    keep
        How many are kept, special tokens and text between frames included.
    ends
        Whether a question ends in it.
    roles : ndarray
        Role of every token of the uncompressed span.
    """

    sample: int
    number: int
    kept: KeptSpan
    keep: int
    ends: bool
    roles: np.ndarray[Any, Any]


def _cuts(call: Call, stage: Stage) -> tuple[list[list[int]], list[Cut]]:
    """Number of kept tokens of every span, as in `choose`; and the spans that lose tokens.

    Special tokens and text between frames are fixed. If no visual token is kept, the text is fixed,
    and so is the last token of a span in which a question ends: its row predicts the next token.
    """
    counts, cuts, order = [], [], call.plan.stages.index(stage)
    for b, spans in enumerate(call.map.spans):
        counts.append([0] * len(spans))
        for j, kept in enumerate(spans):
            # Visual tokens to keep, special tokens included; then also text between frames.
            span, visual = kept.span, call.counts[b][j][order]
            keep, ends = visual + len(span.text), call.map.ends_question(b, kept)
            cut = keep < kept.count and (keep or ends)  # other spans need no reducer
            roles, fixed = np.full(span.length, PATCH if visual else DROPPED), [*span.text]
            if visual:
                fixed += span.special
            elif cut and ends and span.length - 1 not in span.text:
                fixed.append(span.length - 1)
                keep, call.counts[b][j][order] = keep + 1, 1
            roles[fixed], counts[b][j] = FIXED, keep
            if cut:
                cuts.append(Cut(b, j, kept, keep, ends, roles))
    return counts, cuts


class Parts(NamedTuple):
    """Tokens of the chosen spans: patches, which a reducer sees, and fixed tokens.

    Attributes
    ----------
    tokens
        The patches, of spans that have some.
    features : Tensor, shape (m, d)
        Hidden states of all tokens.
    patches, fixed : Tensor of int64, or None
        Rows of `features` with these roles, ascending; None: all tokens are patches.
    """

    tokens: Tokens
    features: Tensor
    patches: Tensor | None
    fixed: Tensor | None


def tokens_of(
    call: Call,
    stage: Stage,
    x: Tensor,
    cuts: list[Cut],
    scores: Tensor | None,
    texts: list[list[Tensor]] | None,
) -> Parts:
    """Build the input of a reducer from the spans that lose tokens.

    Parameters
    ----------
    x : Tensor, shape (B, n, d)
        Hidden states of all rows.
    scores : Tensor of float32, shape (kept visual tokens,), or None
        Attention scores of the tokens of all spans of all samples, concatenated.
    texts
        Per sample, per prompt: key lengths of the text after the last span, (m,), or None.
    """
    rows, needs = call.map, stage.needs
    values, role = _values(call, stage, x, cuts, scores)
    # Spans with patches, and how many patches they have and keep: without fixed tokens.
    seen = [c for c in cuts if (c.roles == PATCH).any()]
    others = [len(c.kept.span.special + c.kept.span.text) for c in seen]
    counts = [c.kept.count - n for c, n in zip(seen, others, strict=True)]
    budgets = [c.keep - n for c, n in zip(seen, others, strict=True)]
    features, patches, fixed = values["features"], None, None
    if role is not None:
        # A sort, because `nonzero` would synchronise with the device to read its length.
        by_role = role.to(torch.uint8).sort(stable=True).indices
        stop = sum(counts) + sum(c.keep for c in cuts) - sum(budgets)
        patches, fixed = by_role[: sum(counts)], by_role[sum(counts) : stop]
        values = {name: value.index_select(0, patches) for name, value in values.items()}
    span_ids = [(c.sample, c.number) for c in seen]
    tokens = Tokens(
        features=values["features"],
        grids=[c.kept.span.grid for c in seen],
        budgets=budgets,
        lengths=counts,
        modalities=[c.kept.span.modality for c in seen],
        index=values.get("index"),
        weights=values.get("weights"),
        scores=values.get("scores"),
        tower={s: values[s] for s in needs if isinstance(s, TowerSignal)},
        queries=_of_prompts(rows, text_values(x, rows), span_ids, x) if QUERY in needs else None,
        query_scores=None if texts is None else _of_prompts(rows, texts, span_ids, x),
        norm=call.adapter.final_norm if NORM in needs else None,
        span_ids=span_ids,
    )
    return Parts(tokens, features, patches, fixed)


def _values(
    call: Call, stage: Stage, x: Tensor, cuts: list[Cut], scores: Tensor | None
) -> tuple[dict[Any, Tensor], Tensor | None]:
    """Values of all tokens of these spans by name or signal of the tower; and the roles of tokens.

    No roles: all tokens are patches. Index tables are built on the host and moved to the device in
    one copy.
    """
    rows, flat = call.map, x.flatten(0, 1)
    tables, adjacent = _host_tables(rows, cuts, scores)
    moved = move_tables(tables, x.device)
    features = flat.index_select(0, moved["rows"]) if adjacent is None else flat[adjacent]
    values: dict[Any, Tensor] = {"features": features}
    if rows.weights is not None:
        values["weights"] = rows.weights.flatten().index_select(0, moved["rows"])
    if scores is not None:
        scores = scores.to(x.device)
        values["scores"] = scores.index_select(0, moved["scored"]) if "scored" in moved else scores
    signals = [s for s in stage.needs if isinstance(s, TowerSignal)]
    for signal in signals:
        by_span = [call.tower.signals[signal][c.sample][c.number] for c in cuts]
        values[signal] = torch.cat(by_span).to(x.device)
    role = moved.get("role")
    if rows.columns is not None and "start" in moved:  # tokens of these spans are missing
        # Index of every token in its uncompressed span, and among all tokens of these spans.
        index = rows.columns.flatten().index_select(0, moved["rows"]) - moved["start"]
        full = index + moved["before"]
        values["index"] = moved["cells"].index_select(0, full) if "cells" in moved else index
        values |= {signal: values[signal].index_select(0, full) for signal in signals}
        role = None if role is None else role.index_select(0, full)
    return values, role


def _host_tables(
    row_map: RowMap, cuts: list[Cut], scores: Tensor | None
) -> tuple[dict[str, Any], slice | None]:
    """Index tables for `_values` by name; and a slice of the flat rows, if contiguous.

    "rows" are flat rows. If tokens are missing, "start" is the first column of the span of every
    row, and "before" the number of tokens of earlier uncompressed spans. "role" and "cells" cover
    all tokens of the uncompressed spans. "scored" indexes the scores.
    """
    spans = [c.kept for c in cuts]
    lengths, role = [s.count for s in spans], np.concatenate([c.roles for c in cuts])
    numbers = [np.arange(c.kept.start, c.kept.stop) + c.sample * row_map.rows for c in cuts]
    first, stop = numbers[0][0], numbers[-1][-1] + 1
    adjacent = slice(first, stop) if stop - first == sum(lengths) else None
    missing = row_map.columns is not None and any(not s.whole for s in spans)
    tables: dict[str, Any] = {}
    if adjacent is None or missing or row_map.weights is not None:
        tables["rows"] = np.concatenate(numbers)
    if missing:
        whole = [s.span.length for s in spans]
        tables["start"] = np.repeat([s.span.start for s in spans], lengths)
        tables["before"] = np.repeat(np.cumsum(whole) - whole, lengths)
    if role.any():
        tables["role"] = role
        tables["cells"] = np.concatenate([np.cumsum(c.roles == PATCH) - 1 for c in cuts])
    # Spans that keep all tokens have scores too, which the reducer does not see.
    if scores is not None and len(scores) > sum(lengths):
        tables["scored"] = _scored_rows(row_map, cuts)
    return tables, adjacent


def _scored_rows(row_map: RowMap, cuts: list[Cut]) -> np.ndarray[Any, Any]:
    """Indices of the tokens of some spans among the kept tokens of all spans."""
    starts = starts_of([s.count for spans in row_map.spans for s in spans])
    before = starts_of([len(spans) for spans in row_map.spans])  # spans of earlier samples
    return rows_of(starts, [before[c.sample] + c.number for c in cuts])


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


def frames_before(call: Call, x: Tensor) -> list[list[Tensor | None]]:
    """The latest frame of the same shape before every span, of the call or an earlier one.

    The call gets the last frame of every span, for the memory of its cache.

    Parameters
    ----------
    x : Tensor, shape (B, n, d)
        Input of the first decoder layer, for all tokens of the call.

    Returns
    -------
    list per sample of list per span of Tensor, shape (height · width, d), or None
        None if there is no earlier frame of this shape.
    """
    found, unknown = [], set()
    for b, known in enumerate(call.memory.of(len(call.map.spans))):
        latest: dict[Any, Tensor | None] = {}
        frames, part, item = [], 0, None
        for kept in call.map.spans[b]:
            span = kept.span
            part, item = (part + 1 if span.item == item else 0), span.item
            _, h, w = span.grid
            key = (FRAMES, span.modality, h, w, part)
            if key not in latest:
                latest[key] = known[key].known() if key in known else None
            frames.append(latest[key])
            if not (kept.whole and span.grid_known):
                unknown.add(span.modality)
                latest[key] = None
                continue
            patches = np.flatnonzero(~span.fixed_mask())[None, -h * w :]
            rows = torch.from_numpy(kept.start + patches[0]).to(x.device)
            latest[key] = frame = x[b, rows].detach()
            call.entered.append(
                Entered(b, key, span.start + patches, frame, (span.start, span.stop))
            )
        found.append(frames)
    call.compared |= {(FRAMES, modality) for modality in call.modalities - unknown}
    return found


# -- the stage in the vision tower --------------------------------------------------------------


def surviving_rows(
    x: Tensor, row_map: RowMap, plan: Plan
) -> tuple[list[list[int]], Chosen, Kept | None]:
    """Read which tokens the tower stage has kept; returns the same as `choose`.

    Embeddings x (B, n, d) are NaN where the tower dropped a cell. Raises `SpanError` if their
    number differs from the plan, or if a question ends in a dropped token, so that no row predicts
    the next token.
    """
    alive = ~x.isnan().any(-1).cpu()  # the only synchronisation with the device
    real = row_map.mask(torch.device("cpu"))
    missing = int((~alive if real is None else ~alive & real).sum())
    counts, chosen, kept_rows, first = [], [], [], 0
    for b, spans in enumerate(row_map.spans):
        counts.append([0] * len(spans))
        for j, kept in enumerate(spans):
            present = alive[b, kept.start : kept.stop]
            _check_survivors(present, kept, plan, b)
            if not present[-1] and row_map.ends_question(b, kept):
                raise SpanError(
                    f"the question of sample {b} ends in the {kept.span.modality} at "
                    f"{kept.span.start}, whose last token the vision tower has dropped. Put "
                    "text after it, or use tower_ratio=0."
                )
            missing -= int((~present).sum())
            counts[b][j] = int(present.sum())
            if counts[b][j] < kept.count:
                chosen.append((b, j))
                kept_rows.append(present.nonzero()[:, 0] + first)
                first += kept.count
    if missing:
        raise SpanError(
            f"{missing} embeddings outside of the known images and videos are NaN. Pass all of "
            "input_ids, pixels and grids as the processor returns them."
        )
    return counts, chosen, Kept(torch.cat(kept_rows)) if kept_rows else None


def _check_survivors(present: Tensor, kept: KeptSpan, plan: Plan, sample: int) -> None:
    """Compare the number of present tokens of a span with the tower stage's count, if known."""
    if plan.tower is not None and plan.tower.decides:
        return
    count, expected = int(present.sum()), plan.entering(kept.span) + len(kept.span.text)
    if count == expected:
        return
    raise SpanError(
        f"the {kept.span.modality} at {kept.span.start} of sample {sample} has {count} of its "
        f"{len(present)} tokens, but the tower stage keeps {expected}. "
        "Features that were computed elsewhere, without the patch or under another tower_ratio, "
        "cannot be used: pass pixels, or use tower_ratio=0."
    )
