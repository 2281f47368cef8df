"""Layer schedules: the fraction of visual tokens seen by every layer, solved for a budget.

Each schedule has a natural shape from its paper. For a target below the mean of that shape, the
same shape prunes earlier (ours); for a target above it, pruning starts later or drops less. The
mean over layers always equals the target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tokencomp.errors import OptionError

Schedule = Callable[[int, float], list[float]]


def early(natural: list[float], target: float) -> list[float]:
    """Lower a natural profile to mean `target` with one more step at the very start.

    The step comes after layer 0 if the later layers still see at least half of `target`;
    otherwise it comes before layer 0.
    """
    total = target * len(natural)
    height = (total - 1) / max(sum(natural[1:]), 1e-9)
    if height >= target / 2:
        return [1.0, *(height * f for f in natural[1:])]
    height = total / max(sum(natural), 1e-9)
    return [height * f for f in natural]


def bisect(mean_at: Callable[[float], list[float]], target: float, lo: float, hi: float) -> float:
    """The parameter in [lo, hi] at which a profile, whose mean grows with it, has mean `target`."""
    for _ in range(80):
        mid = (lo + hi) / 2
        profile = mean_at(mid)
        if sum(profile) / len(profile) < target:
            lo = mid
        else:
            hi = mid
    return hi


def solved(
    family: Callable[[float], list[float]], target: float, lo: float, hi: float
) -> list[float]:
    """The profile of mean `target` in a family of profiles whose mean grows with a parameter.

    `family(lo)` is the published shape. For smaller targets it is lowered from the start, see
    `early`; `family(hi)` drops nothing.
    """
    natural = family(lo)
    if target <= sum(natural) / len(natural):
        return early(natural, target)
    return family(bisect(family, target, lo, hi))


def ramp(num_layers: int, start: float, width: float) -> list[float]:
    """AIM's ramp: layer l lets clamp(1 - (l - start + 1)/width, 0, 1) through to layer l + 1.

    `start` may be fractional: the mean is continuous in it.
    """
    seen = [1.0]
    for layer in range(num_layers - 1):
        fraction = 1.0 - (layer - start + 1) / width
        seen.append(min(seen[-1], max(min(fraction, 1.0), 0.0)))
    return seen


def check_ramp(owner: str, start: float, stop: float) -> None:
    """Raise `OptionError` unless 0 ≤ start < stop ≤ 1."""
    if not 0 <= start < stop <= 1:
        raise OptionError(
            f"{owner}: start={start!r}, stop={stop!r}; allowed: fractions of the depth, "
            "0 ≤ start < stop ≤ 1."
        )


def natural_aim(num_layers: int, start: float = 0.5, stop: float = 22 / 28) -> list[float]:
    """AIM's video schedule, layers 14 … 22 of 28, scaled to the depth (arXiv 2412.03248)."""
    first, last = round(start * num_layers), round(stop * num_layers)
    return ramp(num_layers, first, max(last - first, 1))


def aim(num_layers: int, target: float, start: float = 0.5, stop: float = 22 / 28) -> list[float]:
    """AIM's ramp, moved later for a large target and lowered from the start for a small one."""
    first, last = round(start * num_layers), round(stop * num_layers)
    width = max(last - first, 1)
    return solved(lambda s: ramp(num_layers, s, width), target, first, num_layers + width)


def pyramid(num_layers: int, target: float) -> list[float]:
    """PyramidDrop: × ½, or a larger factor if the target allows, at 1/4, 1/2 and 3/4 of the depth.

    See arXiv 2410.17247.
    """
    return solved(functools.partial(natural_pyramid, num_layers), target, 0.5, 1.0)


def once(num_layers: int, target: float, first: int, least: float) -> list[float]:
    """One cut before layer `first`, or earlier where it would leave less than `least`."""
    for free in range(first, 0, -1):
        left = (target * num_layers - free) / max(num_layers - free, 1)
        if left >= least:
            return [1.0] * free + [left] * (num_layers - free)
    return [target] * num_layers


def fastv(num_layers: int, target: float) -> list[float]:
    """FastV: one cut after layer 2 (arXiv 2403.06764); earlier where the target is too small."""
    return once(num_layers, target, 2, target / 2)


def natural_pyramid(num_layers: int, factor: float = 0.5) -> list[float]:
    """PyramidDrop's published shape: half of the tokens go at 1/4, 1/2 and 3/4 of the depth."""
    return [factor ** (4 * layer // num_layers) for layer in range(num_layers)]


def natural_fastv(num_layers: int) -> list[float]:
    """FastV's published shape: everything up to layer 2, half of the tokens from there on."""
    return [1.0 if layer < 2 else 0.5 for layer in range(num_layers)]


def sparsevlm(num_layers: int, target: float) -> list[float]:
    """SparseVLM's cuts (arXiv 2410.04417), each to a larger share if the target allows."""
    natural = natural_sparsevlm(num_layers)
    return solved(lambda p: [f ** (1 - p) for f in natural], target, 0.0, 1.0)


def natural_sparsevlm(num_layers: int) -> list[float]:
    """SparseVLM's published shape: 300, 200 and 118 of 576 behind layers 2, 6 and 15 of 32."""
    cuts = {16: 118 / 576, 7: 200 / 576, 3: 300 / 576}
    layers = [layer * 32 // num_layers for layer in range(num_layers)]
    return [next((f for first, f in cuts.items() if at >= first), 1.0) for at in layers]


NATURAL: dict[str, Callable[[int], list[float]]] = {
    "aim": natural_aim,
    "pyramid": natural_pyramid,
    "fastv": natural_fastv,
    "sparsevlm": natural_sparsevlm,
}
SCHEDULES: dict[str, Schedule] = {
    "aim": aim,
    "pyramid": pyramid,
    "fastv": fastv,
    "sparsevlm": sparsevlm,
}
