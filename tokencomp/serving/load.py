"""A higher ratio under load: a server that compresses can shed work, where others shed requests."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokencomp.errors import OptionError
from tokencomp.plan.counts import check_ratio

MAX_STEPS = 3  # every ratio has separate entries in prefix and encoder caches
CALM_SECONDS = 10.0  # of fewer than half of a step's requests, after which the step ends
logger = logging.getLogger("tokencomp.serving")

FORM = re.compile(r"([0-9]*\.?[0-9]+):([0-9]+)")


class Step(NamedTuple):
    """From `depth` unanswered requests on, requests that name no ratio have this one."""

    ratio: float
    depth: int


def parse_steps(text: Any, base: float) -> tuple[Step, ...]:
    """Read "0.75:8,0.9:16"; `base` is the ratio without load. Raises `OptionError`."""
    parts = [FORM.fullmatch(part.strip()) for part in str(text).split(",")]
    steps = [Step(check_ratio(float(p[1])), int(p[2])) for p in parts if p] if all(parts) else []
    every = [Step(base, 0), *steps]
    grows = all(a.ratio < b.ratio and a.depth < b.depth for a, b in zip(every, steps, strict=False))
    if not steps or len(steps) > MAX_STEPS or not grows:
        raise OptionError(
            f"ratio_by_load={text!r}: expected up to {MAX_STEPS} steps RATIO:REQUESTS with growing "
            f"numbers above the ratio of the server ({base:g}), such as 0.75:8,0.9:16."
        )
    return tuple(steps)


class Load:
    """Chooses the ratio of every request by the number of unanswered requests (`depth`).

    A step (0: the ratio of the server) begins with the request that finds its depth. It ends when
    no request has found half of its depth for `CALM_SECONDS`: a ratio that changes with every
    request would make caches useless.
    """

    def __init__(self, steps: Sequence[Step], clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self._clock = steps, clock
        self.depth = self.step = 0
        self._busy = clock()  # when a request last found half of the depth of the step

    def join(self) -> float | None:
        """Count a request; return its ratio by load, None for the default."""
        step = self.look()
        self.depth += 1
        return self.steps[step - 1].ratio if step else None

    def look(self) -> int:
        """The number of the step for a request that arrives now."""
        depth, now, before = self.depth, self._clock(), self.step
        reached = sum(depth >= step.depth for step in self.steps)
        if reached >= self.step:
            self.step, self._busy = reached, now
        elif 2 * depth >= self.steps[self.step - 1].depth:
            self._busy = now
        elif calm := int((now - self._busy) / CALM_SECONDS):
            self.step, self._busy = max(reached, self.step - calm), now
        if self.step != before:
            logger.info("ratio by load: step %d, %d requests are unanswered", self.step, depth)
        return self.step

    def leave(self) -> None:
        """Count the end of an answer."""
        self.depth -= 1
