"""The choice of a stage, which every engine makes with `choose_patches`.

An engine says what a stage does to every span (`Cut`) and has the features of their tokens:

    Cut, features ─► Patches ─► reduced ─► keep_last ─► merge_rest ─► with_fixed ─► Kept
                     (Tokens)   (reducer)  (a question  (merge=True)  (line breaks and text
                                           ends in it)                between frames again)

Two spans, of 2 × 2 patches with line breaks and of 1 × 2 patches. An earlier stage has dropped
patch 1 of the first, and `numbers` says which tokens are left:

    uncompressed tokens     0   1   2   3   4   5 | 6   7
    cells                   0   1  -1   2   3  -1 | 0   1     number of the patch; FIXED is -1
    numbers                 0       2   3   4   5 | 6   7
    row of the features     0       1   2   3   4 | 5   6
    patches                 0           2   3     | 5   6     rows that the reducer sees
    fixed                           1           4 |           rows that are kept without it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokencomp.errors import OptionError
from tokencomp.plan.plan import Stage
from tokencomp.reducers.base import reduced
from tokencomp.tokens.signals import TowerSignal
from tokencomp.tokens.stacks import HostIndex, nearest
from tokencomp.tokens.tokens import Kept, Tokens, VisualSpan

FIXED, DROPPED = -1, -2  # in place of a patch number: kept without the reducer, or dropped
NO_TARGET = -1  # for patches that merge into none


@dataclass(frozen=True)
class Cut:
    """What a stage does to one span."""

    span: VisualSpan  # the uncompressed span
    count: int  # its tokens before the stage, special tokens and text between frames included
    keep: int  # its tokens after the stage, likewise
    # Number of the patch of every token of the uncompressed span, `FIXED` or `DROPPED`, int64,
    # shape (span.length,).
    cells: HostIndex
    fraction: float = 1.0  # that the stage keeps of the item, on which merge="auto" depends
    ends: bool = False  # a question ends in it: the row of its last token predicts the next token
    span_id: tuple[int, int] = (0, 0)  # sample, and number of the span in the sample

    @classmethod
    def of(
        cls,
        span: VisualSpan,
        count: int,
        visual: int,
        fraction: float = 1.0,
        ends: bool = False,
        span_id: tuple[int, int] = (0, 0),
    ) -> Cut:
        """The cut that leaves `visual` visual tokens, special ones included, and all text.

        If no visual token is kept, special tokens are dropped too; the last token is kept if a
        question ends in it. If all tokens are kept, all are fixed.
        """
        keep, fixed = visual + len(span.text), [*span.text]
        cells, patches = np.full(span.length, DROPPED), ~span.fixed_mask()
        if visual:
            fixed += span.special
        if visual > len(span.special):
            cells[patches] = np.arange(patches.sum())
        elif not visual and ends and span.length - 1 not in span.text:
            fixed.append(span.length - 1)
            keep += 1
        cells[fixed if keep < count else slice(None)] = FIXED
        return cls(span, count, keep, cells, fraction, ends, span_id)

    @cached_property
    def fixed(self) -> int:
        """How many tokens are kept without the reducer."""
        return min(self.keep, int((self.cells == FIXED).sum()))

    @property
    def chooses(self) -> bool:
        """Whether the reducer chooses some patches of it."""
        return self.fixed < self.keep


@dataclass
class Patches:
    """The tokens of some spans: patches, which the reducer sees, and fixed ones."""

    tokens: Tokens  # the patches of the spans in which the reducer chooses
    cuts: list[Cut]  # these spans
    features: Tensor  # of all tokens of all spans, (m, d)
    # Rows of `features` with these roles, int64, ascending; None: all are patches.
    patches: Tensor | None = None
    fixed: Tensor | None = None

    @classmethod
    def of(
        cls,
        cuts: Sequence[Cut],
        features: Tensor,
        numbers: Tensor | None = None,
        cells: Tensor | None = None,
        values: Mapping[str | TowerSignal, Tensor] | None = None,
    ) -> Patches:
        """The patches of these spans, whose tokens have the features (m, d).

        `numbers`, int64 (m,), are the numbers of the tokens among those of the uncompressed spans;
        None: all are there. `cells` are `cell_table` of the cuts on the device; None: they are not
        there yet, if they are needed. `values` are further values per token, (m, …), by the field
        of `Tokens` or signal of the tower.
        """
        seen = [cut for cut in cuts if cut.chooses]
        roles = needs_cells(cuts)
        counts = [cut.count - cut.fixed for cut in seen]
        budgets = [cut.keep - cut.fixed for cut in seen]
        values, patches, fixed = {"features": features, **(values or {})}, None, None
        if cells is None and (numbers is not None or roles):
            cells = torch.from_numpy(cell_table(cuts)).to(features.device)
        if cells is not None and numbers is not None:
            values["index"] = cells = cells.index_select(0, numbers)
        if cells is not None and roles:
            # A sort, because `nonzero` would wait for the device to read its length.
            by_role = cells.clamp(max=0).sort(descending=True, stable=True).indices
            stop = sum(counts) + sum(cut.keep for cut in cuts) - sum(budgets)
            patches, fixed = by_role[: sum(counts)], by_role[sum(counts) : stop]
            values = {name: value.index_select(0, patches) for name, value in values.items()}
        tokens = Tokens(
            grids=[cut.span.grid for cut in seen],
            budgets=budgets,
            lengths=counts,
            modalities=[cut.span.modality for cut in seen],
            tower={s: v for s, v in values.items() if isinstance(s, TowerSignal)},
            span_ids=[cut.span_id for cut in seen],
            **{name: v for name, v in values.items() if isinstance(name, str)},  # type: ignore[arg-type]  # tensors
        )
        return cls(tokens, seen, features, patches, fixed)


def needs_cells(cuts: Sequence[Cut]) -> bool:
    """Whether some tokens are no patches."""
    return any((cut.cells < 0).any() for cut in cuts)


def cell_table(cuts: Sequence[Cut]) -> HostIndex:
    """`Cut.cells` of all spans, one after the other, on the host."""
    return np.concatenate([cut.cells for cut in cuts])


def choose_patches(patches: Patches, stage: Stage) -> Kept:
    """The choice of a stage among patches, with the options of the stage, and fixed tokens.

    `Kept.patches` are rows of `patches.features`. `stage` has no option that is None.
    """
    from tokencomp.kernels.dispatch import exact

    tokens, cuts, kept = patches.tokens, patches.cuts, None
    if cuts:
        with exact(tokens.features, stage.reducer.traits.batched):
            kept = reduced(stage.reducer, tokens)
            kept = keep_last(kept, tokens, [cut.ends and cut.cells[-1] >= 0 for cut in cuts])
            merging = [stage.merges(cut.span.modality, cut.fraction) for cut in cuts]
            kept = merge_rest(kept, tokens, merging, stage.reducer.name)
    kept = Kept(tokens.table([])) if kept is None else kept
    if patches.patches is None or patches.fixed is None:
        return kept
    return kept.with_fixed(patches.features, patches.patches, patches.fixed)


# -- steps ---------------------------------------------------------------------------------------


def keep_last(kept: Kept, tokens: Tokens, final: Sequence[bool]) -> Kept:
    """Keep the final patch of every span for which `final` is true: a question ends in it.

    It takes the place of the kept patch with the highest number. Its row predicts the next token.
    """
    if not any(final):
        return kept
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


def merge_rest(kept: Kept, tokens: Tokens, merging: Sequence[bool], reducer: str) -> Kept:
    """Merge every patch that is not kept into its nearest kept patch.

        target_i = argmax over kept j of the span of cos(x_i, x_j);    x_j ← Σ w_i x_i / Σ w_i

    over j and all i with target j, where w is the number of tokens that a patch already represents.
    `kept` are patches only. `merging` says of every span whether its patches are merged; otherwise
    they are dropped. `reducer` is the name in the message.
    """
    from tokencomp.kernels import merge_rows

    if not any(merging):
        return kept
    if kept.features is not None or kept.weights is not None:
        raise OptionError(
            f"merge=True: {reducer!r} returns features or weights itself, so there are no "
            "tokens left to merge. Leave merge out; a reducer that merges should say so "
            "(`Traits(merges=True)`)."
        )
    x, rows = tokens.features, kept.patches
    # Every patch merges into its nearest kept patch, or into none; kept patches into themselves.
    target = nearest(tokens.lengths, x, rows, tokens.budgets)
    if not all(merging):
        target = target.where(tokens.per_patch([*map(int, merging)]).bool(), NO_TARGET)
    target = target.index_copy(0, rows, rows)
    merged = merge_rows(x, target, rows, tokens.weights, trusted=True)
    return Kept(rows, merged.x, merged.sizes.float())
