"""Budgets: at most so many visual tokens of an item, or of all items of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokencomp.errors import OptionError, RatioError
from tokencomp.plan.counts import split_evenly
from tokencomp.validation import fits

MAX_BUDGET = 1_000_000
PROMPT = "prompt"


@dataclass(frozen=True)
class Place:
    """Sizes that a budget divides, for one span.

    Attributes
    ----------
    prompt
        Visual tokens of the prompt.
    parts
        Visual tokens of every span of its item.
    part
        Index of the span in `parts`.
    """

    prompt: int
    parts: tuple[int, ...]
    part: int


class Part(Protocol):
    """What `places` reads of a span: the number of its item, and its visual tokens."""

    @property
    def item(self) -> int | None: ...

    @property
    def visual(self) -> int: ...


def places(spans: Sequence[Part]) -> list[Place]:
    """The sizes for every span of one prompt; spans with one `item` number are one item."""
    parts: dict[int | None, list[int]] = {}
    result = []
    for span in spans:
        parts.setdefault(span.item, []).append(span.visual)
    total, seen = sum(map(sum, parts.values())), dict.fromkeys(parts, -1)
    for span in spans:
        seen[span.item] += 1
        result.append(Place(total, tuple(parts[span.item]), seen[span.item]))
    return result


def packed_places(spans: Sequence[Part], prompts: Sequence[tuple[int, list[int]]]) -> list[Place]:
    """The sizes for every span of a row into which several prompts are packed.

    Parameters
    ----------
    prompts
        Per prompt: its tokens, and numbers of its spans.
    """
    found = {
        j: place
        for _, numbers in prompts
        for j, place in zip(numbers, places([spans[j] for j in numbers]), strict=True)
    }
    return [found[j] for j in range(len(spans))]


@dataclass(frozen=True)
class Budget:
    """A budget in visual tokens, as a mean over the decoder layers.

    Attributes
    ----------
    tokens
        At most so many tokens. Every item keeps at least one.
    whole_prompt
        Whether the budget is for all items of a prompt together, which then have one ratio, or
        for each of them.
    """

    tokens: int
    whole_prompt: bool = False

    def __str__(self) -> str:
        return f"budget={f'{PROMPT}=' if self.whole_prompt else ''}{self.tokens}"

    @classmethod
    def of(cls, budget: Any) -> Budget:
        """The budget that `budget=512` or `budget={"prompt": 4096}` asks for.

        Raises
        ------
        RatioError
            No whole number from 1 to a million; a mapping with another key.
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

    def left(self, place: Place) -> float:
        """Fraction of the item of a span that stays, as a mean over the decoder layers."""
        size = place.prompt if self.whole_prompt else sum(place.parts)
        return min(1.0, self.tokens / max(1, size))

    def of_part(self, fraction: float, place: Place) -> float:
        """Fraction that stays of one span of an item of which `fraction` stays.

        The spans share the tokens of the item, so that rounding in each of them does not exceed
        the budget.
        """
        if fraction <= 0.0:
            return fraction
        total = max(1, math.floor(sum(place.parts) * fraction + 1e-9))
        return split_evenly(total, list(place.parts))[place.part] / place.parts[place.part]


def ratio_text(ratio: Any) -> str:
    """A ratio, or ratios by modality, as the command line takes them."""
    if isinstance(ratio, Mapping):
        return ",".join(f"{modality}={value:g}" for modality, value in ratio.items())
    return ratio if isinstance(ratio, str) else f"{ratio:g}"


def check_one_amount(ratio: Any, budget: Any, plan: Any = None) -> dict[str, Any]:
    """The one of ratio and budget that is not None, as arguments; {} for none.

    Raises
    ------
    OptionError
        Both, or one of them beside a plan.
    """
    given = {k: v for k, v in {"ratio": ratio, "budget": budget}.items() if v is not None}
    words = [f"{name}={value!r}" for name, value in given.items()]
    if len(given) > 1:
        raise OptionError(
            f"{words[0]} together with {words[1]}: a budget says in tokens what a ratio says as a "
            "fraction. Leave one out."
        )
    if given and plan is not None:
        raise OptionError(
            f"plan=... together with {words[0]}: a plan has its own fractions. Leave one out."
        )
    return given


def _checked(budget: Any) -> int:
    if not fits(budget, int) or not 1 <= budget <= MAX_BUDGET:
        raise RatioError(
            f"budget={budget!r}: expected a whole number of visual tokens from 1 to {MAX_BUDGET:,}."
            " Use e.g. budget=512."
        )
    return int(budget)
