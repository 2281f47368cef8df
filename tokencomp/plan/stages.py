"""Stages: which reducer acts before a decoder layer or tower block, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tokencomp.errors import PlanError
from tokencomp.plan.counts import Budget, Place, keep_count, split_evenly
from tokencomp.plan.options import Merging, StageOptions
from tokencomp.plan.reducer import AnyReducer, only_plans, unused_options
from tokencomp.validation import check_effect, describe_type, fits

if TYPE_CHECKING:
    from tokencomp.tokens.signals import Signal
    from tokencomp.tokens.spans import Grid, VisualSpan

MEDIA = ("image", "video", "audio")
LEAST_MERGED = 0.1
"""Fraction below which merge="auto" drops: a mean of more than ten tokens says too little."""


def merges(merge: Merging | None, modality: str, fraction: float) -> bool:
    """Whether an item that keeps `fraction` is merged, for a value of the option `merge`."""
    if merge != "auto":
        return bool(merge)
    return modality == "image" and fraction >= LEAST_MERGED - 1e-9


@dataclass(frozen=True)
class Stage(StageOptions):
    """From decoder layer `layer` on, `fraction` of the uncompressed visual tokens is kept.

    Attributes
    ----------
    layer
        0 is the entry stage, before the first decoder layer.
    fraction
        Relative to the *uncompressed* prompt, not to the previous stage.
    reducer
        The reducer that chooses the tokens.
    by_modality
        Fractions of modalities ("image", "video", "audio") that differ from `fraction`, as sorted
        pairs.
    budget
        Instead of `fraction`: the budget of every item.
    share
        Maps the mean fraction of an item over all layers to its fraction from `layer` on; None: the
        same.

    Its options, such as `merge`, are those of `StageOptions`; omitted options are off.

    Raises
    ------
    PlanError
        A layer or fraction of another type; an unknown modality; a reducer that only plans the
        steps of others (a preset or a composition), or that acts before the vision tower or at the
        entry alone.
    OptionError
        An option of the reducer that has no effect there; an option of the stage that is of another
        type, or that the reducer does not allow.
    """

    layer: int
    fraction: float
    reducer: AnyReducer
    by_modality: tuple[tuple[str, float], ...] = ()
    budget: Budget | None = None
    share: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_modality", tuple(sorted(dict(self.by_modality).items())))
        unknown = [k for k, f in self.by_modality if k not in MEDIA or not fits(f, float)]
        if unknown:
            raise PlanError(
                f"stage: by_modality={dict(self.by_modality)!r}; expected fractions of "
                f"{', '.join(MEDIA)}."
            )
        for name, hint in {"layer": int, "fraction": float}.items():
            if not fits(value := getattr(self, name), hint):
                raise PlanError(f"stage: {name}={value!r}; expected {describe_type(hint)}.")
        if fault := _unfit_for_layer(self.reducer, self.layer):
            raise PlanError(f"stage at layer {self.layer}: reducer {self.reducer.name!r} {fault}.")
        check_effect(self.reducer.name, self.reducer, unused_options(self.reducer, pixels=False))
        for name, value in self.options_in_force.items():
            object.__setattr__(self, name, value)
        self.check_options(self.reducer)

    def fraction_of(self, modality: str | None, place: Place | None = None) -> float:
        """The fraction of a modality; None: of modalities without one.

        `place` says which item of a prompt it is, for stages with one amount per item.
        """
        if self.budget is not None and place is not None:
            left = self.budget.left(place)
            return left if self.share is None else self.share(left)
        return dict(self.by_modality).get(modality, self.fraction) if modality else self.fraction

    def merges(self, modality: str, place: Place | None = None) -> bool:
        """Whether dropped tokens of an item are merged; arguments as of `fraction_of`."""
        return merges(self.merge, modality, self.fraction_of(modality, place))

    @property
    def merges_some(self) -> bool:
        """Whether dropped tokens of some items may be merged."""
        return self.merges("image") or (self.merge == "auto" and self.budget is not None)

    @cached_property
    def needs(self) -> frozenset[Signal]:
        needs: frozenset[Signal] = self.reducer.needs
        return needs

    @property
    def most(self) -> float:
        """The largest fraction that the stage keeps of any modality."""
        return max(self.fraction, *(f for _, f in self.by_modality), 0.0)


@dataclass(frozen=True)
class TowerStage:
    """Blocks `block` and later of the vision tower see `fraction` of the cells.

    A cell is the patches that one visual token reads. A cell that the tower drops is a visual
    token that the decoder never gets.

    Attributes
    ----------
    block
        Number of the first block that sees fewer patches; 0: no block sees all patches.
    fraction
        Of the cells of every image or video, in (0, 1]. 1 for a reducer that decides by pixels
        how many cells it keeps, such as `delta`.
    budget
        Instead of `fraction`: the largest number of cells of every image or video.
    reducer
        Chooses the cells: by pixels at block 0, by hidden states at later blocks.
    frames_apart
        Whether the cells of every frame of a video are chosen by themselves, and equally many.
        Set when a model is patched: towers that take pictures as one dense batch need it.

    Raises
    ------
    PlanError
        A block or fraction of another type or range, or a reducer that cannot act in the tower:
        one that needs the question or other signals, merges, chooses the number of tokens, or
        only plans the steps of others; a budget of a whole prompt.
    OptionError
        An option of the reducer that has no effect there.
    """

    block: int
    fraction: float
    reducer: AnyReducer
    frames_apart: bool = False
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if not fits(self.block, int) or self.block < 0:
            raise PlanError(f"tower stage: block {self.block!r}; expected an integer from 0 on.")
        if not fits(self.fraction, float) or not 0.0 < self.fraction <= 1.0:
            raise PlanError(
                f"tower stage: fraction={self.fraction!r}; expected a number in (0, 1], the "
                "fraction of the cells that the tower keeps."
            )
        if self.budget is not None and self.budget.whole_prompt:
            raise PlanError(
                f"tower stage: {self.budget}; the tower encodes an item before the prompt is known "
                "to it. Use a budget for every item."
            )
        if self.decides and (self.block, self.fraction, self.budget) != (0, 1.0, None):
            raise PlanError(
                f"tower stage before block {self.block} with fraction={self.fraction:g}, "
                f"budget={self.budget}: the pixels decide how many cells {self.reducer.name!r} "
                "keeps. Use TowerStage(0, 1.0, reducer), and a ratio or budget in a Stage."
            )
        if fault := _unfit_for_tower(self.reducer):
            raise PlanError(
                f"tower stage: reducer {self.reducer.name!r} {fault}. Use a reducer that looks at "
                "the picture alone, such as 'kcenter', 'runlength', 'uniform' or 'random'."
            )
        check_effect(
            self.reducer.name, self.reducer, unused_options(self.reducer, pixels=self.block == 0)
        )

    @property
    def decides(self) -> bool:
        """Whether the pixels decide how many cells are kept; counts are then upper bounds."""
        return bool(self.reducer.traits.decides)

    def fraction_of(self, place: Place | None = None) -> float:
        """The fraction of the cells of an item; with a budget and without `place`: `fraction`."""
        return self.fraction if self.budget is None or place is None else self.budget.left(place)

    def cells(self, grids: list[Grid]) -> list[int]:
        """Keep counts of parts that share one budget, in proportion to their size.

        Parameters
        ----------
        grids
            (t, h, w) of every part: one for a whole image or video.
        """
        sizes = [math.prod(grid) for grid in grids]
        fraction = self.fraction_of(Place(sum(sizes), tuple(sizes), 0))
        return split_evenly(keep_count(sum(sizes), fraction), sizes)

    def most(self, cells: int) -> int:
        """Upper bound of the keep count of a part of `cells` cells that shares a budget."""
        return min(cells, math.ceil(cells * self.fraction + 0.5))

    def tokens(self, span: VisualSpan) -> int:
        """Visual tokens of `span` that the tower keeps, special ones included."""
        t, h, w = span.grid
        parts, grid = (t, (1, h, w)) if self.frames_apart else (1, span.grid)
        return parts * self.cells([grid])[0] + len(span.special)


def _unfit_for_layer(reducer: AnyReducer, layer: int) -> str:
    """Why a reducer cannot act before a decoder layer, or ""."""
    if only_plans(reducer):
        return "only plans the steps of others. Give it to patch(reducer=...)"
    if reducer.traits.decides:
        return (
            "compares pixels, which are seen before block 0 of the vision tower only. Use "
            "TowerStage(0, 1.0, reducer), or patch(reducer=...)"
        )
    if layer > 0 and reducer.traits.entry_only:
        return "reads the input of the first layer. Move the stage to layer 0"
    return ""


def _unfit_for_tower(reducer: AnyReducer) -> str:
    """Why a reducer cannot choose cells of the vision tower, or ""."""
    if only_plans(reducer):
        return "only plans the steps of others"
    if any(signal.source != "seen" for signal in reducer.needs):
        return "reads the question or attention, which do not exist before the tower has run"
    if reducer.traits.merges:
        return "merges tokens, and a mean of several places of a picture is no picture"
    if reducer.traits.entry_only:
        return "acts on the input of the decoder only"
    return ""
