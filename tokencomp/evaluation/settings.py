"""One row of a comparison: which method at which ratio."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tokencomp.errors import OptionError
from tokencomp.plan import check_ratio

FULL = "full"
DOWNSCALE = "downscale"
FEWER_FRAMES = "fewer_frames"
INPUT_BASELINES = {
    DOWNSCALE: "smaller images and frames, so that the processor makes as few tokens (baseline)",
    FEWER_FRAMES: "fewer video frames (smaller images) for as few tokens (baseline)",
}


@dataclass(frozen=True)
class Setting:
    """A method at a ratio.

    Attributes
    ----------
    reducer
        A registered reducer, "full" (no compression), or an input baseline: "downscale",
        "fewer_frames".
    ratio
        In [0, 1); every method at 0 is the full model.
    options
        Options of the reducer.
    """

    reducer: str = FULL
    ratio: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from tokencomp.reducers.base import make_reducer

        object.__setattr__(self, "ratio", check_ratio(self.ratio))
        if self.reducer == FULL and (self.ratio or self.options):
            raise OptionError(
                f"the uncompressed model ('{FULL}') takes no ratio and no options; got "
                f"ratio={self.ratio}, options={self.options}."
            )
        if self.input_baseline and self.options:
            raise OptionError(f"{self.reducer!r} has no options; got {self.options}.")
        if self.reducer not in (FULL, "auto", *INPUT_BASELINES):
            make_reducer(self.reducer, **self.options)
        if self.ratio == 0:
            object.__setattr__(self, "reducer", FULL)
            object.__setattr__(self, "options", {})

    @property
    def input_baseline(self) -> bool:
        """The processor is given less, the model is left alone."""
        return self.reducer in INPUT_BASELINES

    @property
    def compresses(self) -> bool:
        """The model itself is patched."""
        return self.ratio > 0 and not self.input_baseline

    @property
    def label(self) -> str:
        """Folder and row name, e.g. "aim-0.75" or "prune-0.9-schedule=fastv"."""
        if self.ratio == 0:
            return FULL
        extra = [f"{k}={v}" for k, v in sorted(self.options.items())]
        return "-".join([self.reducer, f"{self.ratio:g}", *extra]).replace("/", "_")

    def key(self) -> str:
        return json.dumps([self.reducer, self.ratio, self.options], sort_keys=True, default=str)

    def __hash__(self) -> int:
        return hash(self.key())


def grid(reducers: Iterable[str], ratios: Iterable[float], **options: Any) -> list[Setting]:
    """The full model, then every reducer at every ratio above 0."""
    above = [r for r in ratios if r > 0]
    return [Setting(), *(Setting(name, r, options) for name in reducers for r in above)]
