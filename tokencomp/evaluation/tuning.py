"""Search over frames, pixels, reducer and ratio for the best use of a token budget.

More frames at a higher ratio can beat fewer frames uncompressed, so the search is over all four.
Choose on validation data; report on test data (`tokencomp eval`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import MediaError, OptionError
from tokencomp.evaluation.baselines import EqualTokens, Resize, faster
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import INPUT_BASELINES, Setting
from tokencomp.inputs.questions import Example, has_video, modality_of
from tokencomp.inputs.video.frames import Frames
from tokencomp.inputs.video.scorer import with_scorer
from tokencomp.plan.counts import MAX_RATIO

ROUNDED = 1.005
"""Tokens are whole, so that a mean over items may end just above a budget."""


@dataclass(frozen=True)
class Scaled(Example):
    """An example whose pictures are scaled, and sounds sped up, before the processor."""

    scale: float = 1.0

    def load(self, frames: Frames) -> list[Any]:
        return [_scaled(m, self.scale) for m in super().load(frames)]


def _scaled(media: Any, scale: float) -> Any:
    """Scale the sides of pictures, and the duration of sounds."""
    if scale == 1.0:
        return media
    if modality_of(media) == "audio":
        return faster(media, scale)
    size = (media[0] if isinstance(media, list) else media).size
    return Resize(size, scale)(media)


@dataclass(frozen=True)
class Candidate:
    """One way to spend tokens, and its measurements: means per item that was answered.

    `tokens` are visual tokens that a layer sees, `seconds` those of the model per answer.
    """

    frames: int | str
    scale: float
    setting: Setting
    tokens: float = 0.0
    seconds: float = 0.0
    accuracy: float = 0.0
    items: int = 0


def candidates(
    model: Any,
    processor: Any,
    items: Sequence[Example],
    *,
    frames: Sequence[int | str],
    scales: Sequence[float],
    reducers: Sequence[tuple[str, Mapping[str, Any]]],
    ratios: Sequence[float],
    tokens: float,
    options: Mapping[str, Any] | None = None,
) -> list[Candidate]:
    """All combinations within the token budget.

    `options` apply to every setting that supports them. For every frames × scale that costs more
    than `tokens` uncompressed, each reducer also gets the ratio that meets the budget exactly.
    Skips scales with the same token count; without a video only the first `frames` is tried.
    """
    counter = EqualTokens(processor, list(adapter_for(model).placeholders), "downscale")
    sizes = sorted(scales, reverse=True)
    fitting: list[Candidate] = []
    for n in frames if any(map(has_video, items)) else frames[:1]:
        means = _mean_tokens(counter, items, with_scorer(n, model, processor), sizes)
        for k, (full, scale) in enumerate(zip(means, sizes, strict=True)):
            if full in means[:k]:
                continue
            exact = [] if full <= tokens else [1.0 - tokens / full]
            for ratio in sorted({0.0, *ratios, *exact}):
                fits = full * (1 - ratio) <= tokens * ROUNDED
                if fits and ratio <= MAX_RATIO:
                    settings = _settings(reducers, ratio, options or {})
                    fitting += [Candidate(n, scale, s, full * (1 - ratio)) for s in settings]
    if not fitting:
        raise OptionError(
            f"no combination gets down to {tokens:g} visual tokens: ratios end at {MAX_RATIO}. "
            "Give fewer --frames, smaller --scale, or more --tokens."
        )
    return fitting


def _settings(
    reducers: Sequence[tuple[str, Mapping[str, Any]]], ratio: float, options: Mapping[str, Any]
) -> list[Setting]:
    """Every reducer at a ratio, with its options and `options`; the full model at 0."""
    if not ratio:
        return [Setting()]
    fixed = options.get("tower_ratio", 0.0)
    if fixed != "auto" and fixed > ratio:
        return []
    return [
        Setting(name, ratio, {**own, **({} if name in INPUT_BASELINES else options)})
        for name, own in reducers
    ]


def _mean_tokens(
    counter: EqualTokens, items: Sequence[Example], frames: Frames, scales: Sequence[float]
) -> list[float]:
    """Visual tokens per item at every scale, over items that the processor accepts at it."""
    from tqdm.auto import tqdm

    totals: list[list[int]] = [[] for _ in scales]
    refused = None
    for e in tqdm(items, desc="counting tokens"):
        try:
            media = e.load(frames)
            for own, scale in zip(totals, scales, strict=True):
                own.append(sum(counter.tokens(_scaled(m, scale)) for m in media))
        except MediaError as error:
            refused = error
    if refused and not all(totals):
        raise refused
    return [sum(own) / len(own) for own in totals]


def search(
    model: Any,
    processor: Any,
    items: Sequence[Example],
    candidates: Sequence[Candidate],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 16,
) -> list[Candidate]:
    """Measure the candidates in turn, batch by batch, so that slow moments affect all equally.

    Candidates with the same frames × scale share preprocessing. The best come first.
    """
    from tqdm.auto import tqdm

    how: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    how["progress"] = False
    runs = {c: EvalRun(c.setting) for c in candidates}
    groups = list(dict.fromkeys((c.frames, c.scale) for c in candidates))
    batches = [items[k : k + batch_size] for k in range(0, len(items), batch_size)]
    rounds = [*itertools.product(batches[:1], groups), *itertools.product(batches, groups)]
    for number, (batch, (frames, scale)) in enumerate(tqdm(rounds, desc="measuring")):
        group = [c for c in candidates if (c.frames, c.scale) == (frames, scale)]
        known = [{f.name: getattr(e, f.name) for f in fields(Example)} for e in batch]
        scaled = [Scaled(**one, scale=scale) for one in known]
        settings = [c.setting for c in group]
        answered = sweep(model, processor, scaled, settings, frames=frames, **how)
        for c in group if number >= len(groups) else ():  # the first round is to warm up
            runs[c].records += answered[c.setting].records
    measured = []
    for c, run in runs.items():
        means = (run.mean_tokens, run.mean("seconds"), run.mean("correct"), len(run.answered))
        tokens, seconds, accuracy, count = means if run.answered else (0.0, 0.0, 0.0, 0)
        measured.append(replace(c, tokens=tokens, seconds=seconds, accuracy=accuracy, items=count))
    return sorted(measured, key=lambda c: (-c.accuracy, c.tokens))


def within(measured: Sequence[Candidate], tokens: float) -> list[Candidate]:
    """Candidates whose measured tokens are within the budget."""
    return [c for c in measured if c.tokens <= tokens * ROUNDED]


def pareto(measured: Sequence[Candidate]) -> list[Candidate]:
    """Answered candidates that no other one beats at the same or fewer tokens, fewest first."""
    front: list[Candidate] = []
    for c in sorted((c for c in measured if c.items), key=lambda c: (c.tokens, -c.accuracy)):
        if not front or c.accuracy > front[-1].accuracy:
            front.append(c)
    return front


def as_json(measured: Sequence[Candidate], facts: dict[str, Any]) -> str:
    """Budget, environment and all candidates as JSON text."""
    front = pareto(measured)
    rows = []
    for c in measured:
        row = {k: v for k, v in vars(c).items() if k != "setting"}
        row |= {"reducer": c.setting.name, "ratio": c.setting.ratio, "pareto": c in front}
        rows.append(row)
    return json.dumps({**facts, "candidates": rows}, indent=2) + "\n"
