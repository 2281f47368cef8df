"""Ratios, budgets in tokens, and their division among spans and frames."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokencomp.errors import RatioError
from tokencomp.validation import fits

MAX_RATIO = 0.95
MAX_BUDGET = 1_000_000
PROMPT = "prompt"


def check_ratio(ratio: Any, name: str = "ratio", instead: str = "") -> float:
    """Return `ratio` as a float in [0, 1); raise `RatioError` otherwise, also for text.

    The message has the `name` of the argument, and what else it takes (`instead`).
    """
    if not fits(ratio, float) or not 0.0 <= ratio < 1.0:
        if name == "ratio" and fits(ratio, int) and ratio > 1:
            instead += f", or budget={ratio} for tokens of every item"
        raise RatioError(
            f"{name}={ratio!r}: expected a number in [0, 1), the fraction of visual-token work to "
            f"remove (0 = off, 0.75 = a quarter is left). Use e.g. {name}=0.5{instead}."
        )
    return float(ratio)


def parse_ratio(text: str, name: str = "ratio") -> float:
    """`check_ratio` for text of a command line or of a schedule."""
    ratio: Any = text
    with contextlib.suppress(ValueError):
        ratio = float(text)
    return check_ratio(ratio, name)


def split_evenly(total: int, counts: list[int]) -> list[int]:
    """Split `total` over groups in proportion to `counts`, as integers with exactly that sum.

    No group gets more than its count if `total` is at most their sum. With less than one per group,
    the last group of every run gets it.
    """
    everything = max(sum(counts), 1)
    ends = [total * c // everything for c in itertools.accumulate(counts, initial=0)]
    return [b - a for a, b in itertools.pairwise(ends)]


def frame_budgets(
    weights: Sequence[float], total: int, most: Sequence[int], least: int = 0
) -> list[int]:
    """Split `total` tokens over frames in proportion to `weights`, as integers of that sum.

    Weights are at least 0; if all are 0, shares are equal. `most` are the tokens of every frame,
    and `total` is at most their sum. Every frame gets `least`, if the total allows it, and its
    share of the rest, rounded down. What remains goes to the largest remainders, one token each;
    ties go to the lower frame. The excess of full frames goes to the others in the same order.
    """
    # Every frame gets `least`, then its share of the rest, rounded down.
    base = [min(least, n) for n in most]
    if sum(base) > total:
        base = [0] * len(base)
    everything, rest = sum(weights), total - sum(base)
    if everything <= 0:
        weights, everything = [1.0] * len(base), float(len(base))
    shares = [b + w / everything * rest for b, w in zip(base, weights, strict=True)]
    budgets = [min(n, int(share)) for n, share in zip(most, shares, strict=True)]
    # The remaining tokens go to the largest remainders.
    order = sorted(range(len(shares)), key=lambda i: (round(int(shares[i]) - shares[i], 9), i))
    while (missing := total - sum(budgets)) > 0:
        for i in [i for i in order if budgets[i] < most[i]][:missing]:
            budgets[i] += 1
    return budgets


# -- budgets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BudgetShare:
    """The share of one span in a budget: sizes of the prompt, the item and its spans."""

    prompt: int  # visual tokens of the prompt
    parts: tuple[int, ...]  # visual tokens of every span of its item
    part: int  # index of the span in `parts`
    frames: int = 1  # of the item
    modality: str = "image"


class SpanSize(Protocol):
    """Fields of a span that `budget_shares` reads.

    They are the first column of its item, its visual tokens, its modality and its (t, h, w).
    """

    @property
    def item(self) -> int | None: ...

    @property
    def visual(self) -> int: ...

    @property
    def modality(self) -> Any: ...

    @property
    def grid(self) -> tuple[int, int, int]: ...


def budget_shares(spans: Sequence[SpanSize]) -> list[BudgetShare]:
    """The share of every span of one prompt; spans with one `item` are parts of that item."""
    parts: dict[int | None, list[int]] = {}
    frames: dict[int | None, int] = {}
    result = []
    for span in spans:
        parts.setdefault(span.item, []).append(span.visual)
        frames[span.item] = frames.get(span.item, 0) + span.grid[0]
    total, seen = sum(map(sum, parts.values())), dict.fromkeys(parts, -1)
    for span in spans:
        seen[span.item] += 1
        item = tuple(parts[span.item]), seen[span.item], frames[span.item], span.modality
        result.append(BudgetShare(total, *item))
    return result


def packed_shares(
    spans: Sequence[SpanSize], prompts: Sequence[tuple[int, list[int]]]
) -> list[BudgetShare]:
    """The share of every span of a row into which several prompts are packed.

    `prompts` has the number of tokens of every prompt, and the numbers of its spans.
    """
    found = {
        j: share
        for _, numbers in prompts
        for j, share in zip(numbers, budget_shares([spans[j] for j in numbers]), strict=True)
    }
    return [found[j] for j in range(len(spans))]


@dataclass(frozen=True)
class Budget:
    """A budget in visual tokens, as a mean over the decoder layers."""

    tokens: int  # the largest number of tokens; every item keeps at least one
    # Whether the budget is for all items of a prompt together, which then have one ratio, or for
    # each of them.
    whole_prompt: bool = False

    def __str__(self) -> str:
        return f"budget={f'{PROMPT}=' if self.whole_prompt else ''}{self.tokens}"

    @classmethod
    def of(cls, budget: Any) -> Budget:
        """The budget that `budget=512` or `budget={"prompt": 4096}` asks for.

        `RatioError` for no whole number from 1 to a million, or a mapping with another key.
        """
        if isinstance(budget, Mapping):
            if set(budget) != {PROMPT}:
                raise RatioError(
                    f"budget={dict(budget)!r}: expected one key, {PROMPT!r}, for a budget of all "
                    'media of a prompt together. Use e.g. budget={"prompt": 4096}, or budget=512 '
                    "for every image or clip."
                )
            return cls(_checked(budget[PROMPT]), whole_prompt=True)
        return cls(_checked(budget))

    def left(self, share: BudgetShare) -> float:
        """Fraction of the item of a span that is kept, as a mean over the decoder layers."""
        size = share.prompt if self.whole_prompt else sum(share.parts)
        return min(1.0, self.tokens / max(1, size))

    def of_part(self, fraction: float, share: BudgetShare) -> float:
        """Fraction that is kept of one span of an item that keeps `fraction`.

        The spans share the tokens of the item, so that their rounding does not exceed the budget.
        """
        if fraction <= 0.0:
            return fraction
        total = max(1, math.floor(sum(share.parts) * fraction + 1e-9))
        return split_evenly(total, list(share.parts))[share.part] / share.parts[share.part]


def ratio_text(ratio: Any) -> str:
    """A ratio, or ratios by modality, as the command line takes them."""
    if isinstance(ratio, Mapping):
        return ",".join(f"{modality}={value:g}" for modality, value in ratio.items())
    return ratio if isinstance(ratio, str) else f"{ratio:g}"


def _checked(budget: Any) -> int:
    if not fits(budget, int) or not 1 <= budget <= MAX_BUDGET:
        raise RatioError(
            f"budget={budget!r}: expected a whole number of visual tokens from 1 to {MAX_BUDGET:,}."
            " Use e.g. budget=512; ratio=0.75 removes a share."
        )
    return int(budget)
