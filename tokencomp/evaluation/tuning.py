"""Frames, pixels, reducer and ratio: which of them spends a token budget best.

More frames at a higher ratio can beat fewer frames uncompressed, so the search is over all four.
Choose on validation data; report on test data (`tokencomp eval`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from tokencomp.adapters.base import adapter_for
from tokencomp.errors import OptionError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.runner import Run, sweep
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.questions import Example
from tokencomp.plan import MAX_RATIO

SCREENED = 1 / 3
KEPT = 0.5


@dataclass(frozen=True)
class Scaled(Example):
    """An example whose pictures are scaled before the processor sees them."""

    scale: float = 1.0

    def load(self, frames: int) -> list[Any]:
        return [_scaled(m, self.scale) for m in super().load(frames)]


def _scaled(media: Any, scale: float) -> Any:
    if isinstance(media, list):
        return [_scaled(frame, scale) for frame in media]
    size = (max(1, round(media.width * scale)), max(1, round(media.height * scale)))
    return media if scale == 1.0 else media.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Candidate:
    """One way to spend tokens, and what it gave.

    Attributes
    ----------
    frames, scale
        Frames per video; side of pictures against the original.
    reducer, ratio
    tokens
        Visual tokens per item that a decoder layer sees, mean over layers and items.
    seconds
        Model time per answer.
    accuracy, items
    screened
        True if it was dropped after the first share of the items.
    """

    frames: int
    scale: float
    reducer: str
    ratio: float
    tokens: float = 0.0
    seconds: float = 0.0
    accuracy: float = 0.0
    items: int = 0
    screened: bool = False

    @property
    def setting(self) -> Setting:
        return Setting(self.reducer, self.ratio)


def candidates(
    model: Any,
    processor: Any,
    items: Sequence[Example],
    *,
    frames: Sequence[int],
    scales: Sequence[float],
    reducers: Sequence[str],
    ratios: Sequence[float],
    tokens: float | None,
) -> list[Candidate]:
    """All combinations within the token budget.

    For every frames × scale that costs more than `tokens` uncompressed, each reducer also gets
    the ratio that meets the budget exactly; scales that do not change the token count are left
    out.

    Raises
    ------
    OptionError
        Nothing fits the budget.
    """
    counter = EqualTokens(processor, list(adapter_for(model).placeholder_ids()), "downscale")
    found, seen = [], set()
    for n, scale in itertools.product(frames, sorted(scales, reverse=True)):
        full = _mean_tokens(counter, items, n, scale)
        if (n, full) in seen:
            continue
        seen.add((n, full))
        exact = [] if tokens is None or full <= tokens else [1.0 - tokens / full]
        for ratio in sorted({0.0, *ratios, *exact}):
            fits = tokens is None or full * (1 - ratio) <= tokens * 1.005
            if fits and ratio <= MAX_RATIO:
                names = ["full"] if ratio == 0 else reducers
                found += [Candidate(n, scale, name, ratio, full * (1 - ratio)) for name in names]
    if not found:
        raise OptionError(
            f"no combination gets down to {tokens:g} visual tokens: ratios end at {MAX_RATIO}. "
            "Give fewer --frames, smaller --scale, or more --tokens."
        )
    return found


def _mean_tokens(
    counter: EqualTokens, items: Sequence[Example], frames: int, scale: float
) -> float:
    """Visual tokens per item, over up to eight of the items."""
    some = items[:: max(1, len(items) // 8)][:8]
    totals = [sum(counter.tokens(_scaled(m, scale)) for m in e.load(frames)) for e in some]
    return sum(totals) / len(totals)


def search(
    model: Any,
    processor: Any,
    items: Sequence[Example],
    given: Sequence[Candidate],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    name: str = "",
) -> list[Candidate]:
    """Measure the candidates in turn; the worse half is dropped after a third of the items.

    Returns
    -------
    list of Candidate
        Best accuracy first; dropped ones at the end.
    """
    how = {"max_new_tokens": max_new_tokens, "name": name}

    def measure(some: Sequence[Example], these: Sequence[Candidate]) -> dict[Candidate, Run]:
        return _measure(model, processor, some, these, batch_size, how)

    first = items[:: round(1 / SCREENED)] if len(given) > 4 else list(items)
    measure(first[:batch_size], given)  # warm-up: nothing of it is kept
    runs = measure(first, given)
    measured = sorted((_result(c, runs[c]) for c in given), key=_better)
    if len(first) == len(items):
        return measured
    count = max(4, round(len(measured) * KEPT))
    screened = [replace(c, screened=True) for c in measured[count:]]
    rest = [e for k, e in enumerate(items) if k % round(1 / SCREENED)]
    going = [c for c in given if _key(c) in {_key(m) for m in measured[:count]}]
    more = measure(rest, going)
    for c in going:
        runs[c].records += more[c].records
    return [*sorted((_result(c, runs[c]) for c in going), key=_better), *screened]


def _key(c: Candidate) -> tuple[Any, ...]:
    return c.frames, c.scale, c.reducer, c.ratio


def _better(c: Candidate) -> tuple[float, float]:
    return -c.accuracy, c.tokens


def _measure(
    model: Any,
    processor: Any,
    items: Sequence[Example],
    given: Sequence[Candidate],
    batch_size: int,
    how: dict[str, Any],
) -> dict[Candidate, Run]:
    """Ask batch after batch under all candidates in turn, so that a slow minute strikes them all.

    Candidates of one frames × scale share decoding and preprocessing.
    """
    from tqdm.auto import tqdm

    found = {c: Run(c.setting) for c in given}
    groups = list(dict.fromkeys((c.frames, c.scale) for c in given))
    batches = [items[k : k + batch_size] for k in range(0, len(items), batch_size)]
    for batch, (frames, scale) in tqdm(list(itertools.product(batches, groups)), desc="measuring"):
        here = [c for c in given if (c.frames, c.scale) == (frames, scale)]
        scaled = [Scaled(e.id, e.prompt, e.answer, e.media, e.family, scale=scale) for e in batch]
        settings = [c.setting for c in here]
        more = {"batch_size": batch_size, "progress": False, **how}
        runs = sweep(model, processor, scaled, settings, frames=frames, **more)
        for c in here:
            found[c].records += runs[c.setting].records
    return found


def _result(c: Candidate, run: Run) -> Candidate:
    good = run.answered
    seen = [sum(r["per_layer"]) / len(r["per_layer"]) for r in good]
    return replace(
        c,
        tokens=sum(seen) / max(len(seen), 1),
        seconds=run.mean("seconds"),
        accuracy=run.mean("correct"),
        items=len(good),
    )


def pareto(measured: Sequence[Candidate], cost: str = "tokens") -> list[Candidate]:
    """Candidates that nothing beats at the same or a lower cost, cheapest first.

    Parameters
    ----------
    cost
        "tokens" or "seconds".
    """
    full = [c for c in measured if not c.screened]
    front: list[Candidate] = []
    for c in sorted(full, key=lambda c: (getattr(c, cost), -c.accuracy)):
        if not front or c.accuracy > front[-1].accuracy:
            front.append(c)
    return front


def read_examples(path: Path) -> list[Example]:
    """Examples from a JSON Lines file: `question`, `answer`, `media` (a path or paths), `id`.

    Media paths are relative to the file.

    Raises
    ------
    OptionError
        The file is missing, empty or no text, a line lacks a field, or two have the same id.
    """
    found: dict[str, Example] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--data {path}: {error}. Give a JSON Lines file.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            media = row["media"] if isinstance(row["media"], list) else [row["media"]]
            paths = tuple(path.parent / m for m in media)
            name = str(row.get("id", number))
            if name in found:
                raise OptionError(
                    f"{path}, line {number}: id {name!r} is taken by an earlier line."
                )
            found[name] = Example(name, row["question"], str(row["answer"]), paths)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise OptionError(
                f"{path}, line {number}: {error!r}. Expected an object with question, answer and "
                "media (a path or a list of paths)."
            ) from error
    if not found:
        raise OptionError(f"{path} has no questions; give at least one line.")
    return list(found.values())


def as_json(measured: Sequence[Candidate], cost: str, facts: dict[str, Any]) -> str:
    front = {_key(c) for c in pareto(measured, cost)}
    rows = [{**asdict(c), "pareto": _key(c) in front} for c in measured]
    return json.dumps({**facts, "candidates": rows}, indent=2) + "\n"
