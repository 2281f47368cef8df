"""How much of every item leaves, where items differ: budgets, ratios in order or by age."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokencomp.errors import OptionError, RatioError
from tokencomp.plan.counts import check_ratio, split_evenly
from tokencomp.validation import fits

MAX_BUDGET = 1_000_000
PROMPT = "prompt"


@dataclass(frozen=True)
class Place:
    """Where one span stands among the items of its prompt.

    Attributes
    ----------
    number
        Of its item in the prompt, from 0 on.
    items
        Visual tokens of every item of the prompt.
    parts
        Visual tokens of every span of its item.
    part
        Which of these spans it is.
    """

    number: int
    items: tuple[int, ...]
    parts: tuple[int, ...]
    part: int


class Part(Protocol):
    """What `places` reads of a span: the number of its item, and its visual tokens."""

    @property
    def item(self) -> int | None: ...

    @property
    def visual(self) -> int: ...


def places(spans: Sequence[Part]) -> list[Place]:
    """The place of every span of one prompt; spans with one `item` number belong together."""
    parts: dict[int | None, list[int]] = {}
    for span in spans:
        parts.setdefault(span.item, []).append(span.visual)
    numbers, items = {item: i for i, item in enumerate(parts)}, tuple(map(sum, parts.values()))
    seen = dict.fromkeys(parts, -1)
    result = []
    for span in spans:
        seen[span.item] += 1
        own = tuple(parts[span.item])
        result.append(Place(numbers[span.item], items, own, seen[span.item]))
    return result


def packed_places(spans: Sequence[Part], prompts: Sequence[tuple[int, list[int]]]) -> list[Place]:
    """The place of every span of a row; each prompt packed into it has items of its own.

    Parameters
    ----------
    prompts
        Per prompt: its tokens, and numbers of its spans.
    """
    found = {
        j: place
        for _, own in prompts
        for j, place in zip(own, places([spans[j] for j in own]), strict=True)
    }
    return [found[j] for j in range(len(spans))]


@dataclass(frozen=True)
class Amount:
    """What stays of every item. Exactly one of the first four fields is set.

    Attributes
    ----------
    budget
        At most so many visual tokens of every item, as a mean over the decoder layers.
    prompt
        At most so many of all items of a prompt together. Every item keeps one, and the others
        are divided in proportion to the size of the items.
    ratios
        Ratios of the items of a prompt, in order.
    decay
        What stays of an item, times this for every item behind it; at least one token.
    newest
        Ratio of the last item of a prompt, beside `decay`.
    """

    budget: int | None = None
    prompt: int | None = None
    ratios: tuple[float, ...] = ()
    decay: float | None = None
    newest: float = 0.0

    def __str__(self) -> str:
        if self.decay is not None:
            return f"ratio={self.newest:g},decay={self.decay:g}"
        if self.ratios:
            return f"ratio=[{','.join(f'{r:g}' for r in self.ratios)}]"
        return f"budget={self.budget or f'{PROMPT}={self.prompt}'}"

    @classmethod
    def of(cls, budget: Any) -> Amount:
        """The amount that `budget=512` or `budget={"prompt": 4096}` asks for.

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
            return cls(prompt=_checked(budget[PROMPT]))
        return cls(budget=_checked(budget))

    @classmethod
    def in_order(cls, ratios: Sequence[Any]) -> Amount:
        """The amount of `ratio=[0.5, 0.75]`; raises `RatioError` for a bad or no ratio."""
        if not ratios:
            raise RatioError("ratio=[]: expected one ratio for every item of the prompt, in order.")
        return cls(ratios=tuple(check_ratio(r, f"ratio[{i}]") for i, r in enumerate(ratios)))

    @property
    def alone(self) -> bool:
        """Whether what stays of an item does not depend on the other items of its prompt."""
        return self.budget is not None

    def left(self, place: Place) -> float:
        """Fraction of the item at `place` that stays, as a mean over the decoder layers.

        Raises
        ------
        RatioError
            Another number of items than of ratios; or a budget below one token for every item.
        """
        count, size = len(place.items), place.items[place.number]
        if self.ratios:
            if len(self.ratios) != count:
                raise RatioError(
                    f"ratio={list(self.ratios)!r} has {len(self.ratios)} ratios, but a prompt has "
                    f"{count} items (images, clips or sounds). Give one for each, in order, or one "
                    "number for all."
                )
            return 1.0 - self.ratios[place.number]
        if self.decay is not None:
            age = count - 1 - place.number
            return max((1.0 - self.newest) * self.decay**age, 1.0 / max(1, size))
        if self.budget is not None:
            return min(1.0, self.budget / max(1, size))
        total = self.prompt or 0
        if total < count:
            raise RatioError(
                f'budget={{"prompt": {total}}}: below one token for each of the {count} items of a '
                "prompt. Raise it, or send fewer items."
            )
        if total >= sum(place.items):
            return 1.0
        more = split_evenly(total - count, [n - 1 for n in place.items])
        return (1 + more[place.number]) / max(1, size)

    def of_part(self, fraction: float, place: Place) -> float:
        """Fraction that stays of one span of an item of which `fraction` stays.

        The spans share a budget, so that rounding in each of them does not exceed it.
        """
        if self.ratios or self.decay is not None or fraction <= 0.0:
            return fraction
        total = max(1, math.floor(sum(place.parts) * fraction + 1e-9))
        return split_evenly(total, list(place.parts))[place.part] / place.parts[place.part]


def check_decay(decay: Any) -> float:
    """Return `decay` as a float in (0, 1]; raise `RatioError` otherwise."""
    if not fits(decay, float) or not 0.0 < decay <= 1.0:
        raise RatioError(
            f"decay={decay!r}: expected a number in (0, 1], by which what stays of an image is "
            "multiplied for every newer one (1 = no decay, 0.5 = half as much of each older one). "
            "Use e.g. ratio=0, decay=0.5."
        )
    return float(decay)


def ratio_text(ratio: Any) -> str:
    """A ratio, or ratios by kind of media, as the command line takes them."""
    if isinstance(ratio, Mapping):
        return ",".join(f"{kind}={value:g}" for kind, value in ratio.items())
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
