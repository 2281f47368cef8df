"""Takes the counts of a prefill from its forward pass, and warns where they miss the ratio."""

from __future__ import annotations

import warnings
from typing import Any

from tokencomp.engine.count.stats import Stats
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.errors import RatioWarning
from tokencomp.plan.plan import Plan
from tokencomp.plan.reducer import counts_itself

REMEMBERED = 1000  # sets of media; then they are looked at again


def collect(forward: ForwardPass, layer: Any) -> Stats:
    """Stats of a finished forward pass; what follows from the config and the plan comes later.

    Parameters
    ----------
    layer
        The first layer of its cache that holds rows, or None.
    """
    keys = layer.keys if layer is not None else None
    if keys is None:
        keys = next(forward.adapter.decoder.parameters())
    return Stats(
        spans=forward.spans,
        counts=forward.counts,
        lengths=forward.lengths,
        prompts=forward.prompts,
        past=forward.segments[0].logical,
        past_rows=[s.physical for s in forward.segments for _ in range(s.first, s.stop)],
        reduce_seconds=forward.reduce_seconds,
        prefill_chunk=forward.chunk,
        tower_costs=forward.tower_costs,
        _config=forward.adapter.text_config,
        _itemsize=keys.element_size(),
        _plan=forward.plan,
        _places=forward.places,
        _survivors=forward.survivors,
        _repeated=_repeated(forward) if forward.repeated else [],
        _kept=forward.kept,
    )


def _repeated(forward: ForwardPass) -> list[list[int]]:
    """Per sample, the rows that every decoder layer caches."""
    parts = [(forward.repeated.get(s.first, s.layout.lengths), s) for s in forward.segments]
    layers = [lengths for lengths, s in parts for _ in range(s.first, s.stop)]
    return [list(sample) for sample in zip(*layers, strict=True)]


class MissedRatios:
    """Warns, once per plan, of a prompt that misses its ratio by more than rounding.

    What a prompt misses depends on its media and counts alone, so that prompts with equal media are
    looked at once.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()  # names of plans
        self._plan: Plan | None = None
        self._seen: set[str] = set()  # media and counts under this plan

    def look(self, stats: Stats, plan: Plan) -> None:
        """Warn if a prompt was the first to miss the ratio of its plan."""
        if plan is not self._plan or len(self._seen) > REMEMBERED:
            self._plan, self._seen = plan, set()
        media = [
            [(s.modality, s.length, len(s.special), len(s.text), s.item) for s in row]
            for row in stats.spans
        ]
        seen = f"{media} {stats.counts}"
        if seen not in self._seen:
            self._seen.add(seen)
            self._check(stats, plan)

    def _check(self, stats: Stats, plan: Plan) -> None:
        """Rounding is a token per span, or a twentieth of what should be left.

        A plan whose reducers all choose the number of tokens themselves promises no ratio.
        """
        spans, before = sum(map(len, stats.spans)), sum(stats.tokens_before)
        planned, achieved = stats.requested_ratio, stats.ratio
        if not before or abs(planned - achieved) <= max(0.05 * (1 - planned), spans / before):
            return
        own = [counts_itself(s.reducer) for s in plan.stages]
        stages = [
            (s.layer, s.fraction, s.by_modality, s.budget, s.reducer.name) for s in plan.stages
        ]
        name = f"{stages}{plan.tower and plan.tower.fraction}"
        if name in self._warned or (own and all(own)):
            return
        self._warned.add(name)
        warnings.warn(
            f"a prompt was planned for ratio {planned:.5g} and reached {achieved:.5g}: "
            f"{_reason(stats, own)}. The handle's stats have the counts of every prompt. This "
            "warning appears once per plan.",
            RatioWarning,
            stacklevel=3,
        )


def _reason(stats: Stats, own: list[bool]) -> str:
    """Why a ratio was missed; `own` says which stages leave a number of their own."""
    every = [span for row in stats.spans for span in row]
    most = max(every, key=lambda span: len(span.special) / max(1, span.visual))
    if not own:
        return (
            "the vision tower keeps a cell or more of every frame, and special tokens always stay"
        )
    if most.special and stats.ratio < stats.requested_ratio and not any(own):
        return (
            f"special tokens, such as line breaks, always stay, {len(most.special)} of "
            f"{most.visual} in one {most.modality}"
        )
    return "a reducer of this plan leaves a number of tokens of its own"
