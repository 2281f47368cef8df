"""Optimizer steps in phases: seeded, checked, and resumed after a kill."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tokencomp.storage import replace_file
from tokencomp.training.checks import check_finite, load_checkpoint

log = logging.getLogger(__name__)
FORMAT = 2
"""Of checkpoints; part of their identity."""
DECAY = 0.95  # of running scores, per batch
SAVE_SECONDS = 60.0
"""Longest time between checkpoints: what a kill may cost, and the step it falls in."""


class RunningScores(dict[str, float]):
    """Name → exponentially weighted mean of a score over the latest batches."""

    def note(self, name: str, value: float) -> None:
        self[name] = DECAY * self.get(name, value) + (1 - DECAY) * value

    def percent(self) -> dict[str, int]:
        """The scores in percent, by name."""
        return {name: round(100 * value) for name, value in sorted(self.items())}


@dataclass(frozen=True)
class Phase:
    """Optimizer steps of one kind.

    The learning rate warms up over `warmup` steps and follows a cosine from `start` to `end`, which
    are fractions of its peak.
    """

    name: str
    steps: int
    _: KW_ONLY
    warmup: int = 20
    start: float = 1.0
    end: float = 1.0

    def rate(self, step: int) -> float:
        """Fraction of the peak at `step`."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, self.steps)))
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return warm * (self.end + (self.start - self.end) * cosine)


class Steps(ABC):
    """Trains `parameters` phase by phase. A subclass defines a step.

    Batches must depend only on phase and step, so that a resumed run ends with the same weights.
    `checkpoint` is written every `save_every` steps, every `SAVE_SECONDS` and after each phase, and
    an existing one of the same `identity` is resumed; `OptionError` if it cannot be written, or
    belongs to another run. None: none is written. Groups of the optimizers may have a `scale` of
    the learning rate. `seed` decides dropout, which depends on the step as well.

    `step` counts the steps done in the current `phase`; `history` and `seconds` are the losses of
    all steps and their time, over all sessions; a subclass notes `scores` of its batches.
    """

    clip = 1.0  # largest norm of all gradients together

    def __init__(
        self,
        phases: Sequence[Phase],
        parameters: Mapping[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        checkpoint: Path | None,
        identity: Mapping[str, Any],
        seed: int,
        save_every: int,
    ) -> None:
        self.phases, self.parameters, self.optimizers = phases, parameters, optimizers
        self.checkpoint, self.seed, self.save_every = checkpoint, seed, save_every
        self.identity = {**identity, "format": FORMAT}
        self.phase, self.step, self.seconds = 0, 0, 0.0
        self.history: list[float] = []
        self.scores = RunningScores()
        if state := load_checkpoint(checkpoint, self.identity):
            self._resume(state)

    @abstractmethod
    def batches(self) -> Iterable[Any]:
        """Batches of the current phase, from the current step on."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """A scalar with a gradient."""

    @abstractmethod
    def peak(self, group: dict[str, Any]) -> float:
        """Largest learning rate of a group of parameters in the current phase."""

    def run(self, stop_after: int | None = None) -> bool:
        """Train to the end of the last phase (True), or for `stop_after` steps (False).

        Raises `ScoreError` if a loss or gradient is not finite; the last checkpoint stays.
        """
        saved = time.monotonic()
        begin, done = saved - self.seconds, 0
        for phase in self.phases[self.phase :]:
            bar = tqdm(self.batches(), phase.name, phase.steps, initial=self.step, mininterval=2)
            for batch in bar:
                self.history.append(self._train(phase, batch))
                self.step, done = self.step + 1, done + 1
                self.seconds = time.monotonic() - begin
                recent = self.history[-50:]
                shown = {"loss": f"{sum(recent) / len(recent):.3f}", **self.scores.percent()}
                bar.set_postfix(shown, refresh=False)
                late = time.monotonic() - saved >= SAVE_SECONDS
                if late or done == stop_after or self.step % self.save_every == 0:
                    self.save()
                    saved = time.monotonic()
                    log.info("%s %d %.0f s %s", phase.name, self.step, self.seconds, shown)
                if done == stop_after:
                    return False
            self.end_phase()
            self.phase, self.step = self.phase + 1, 0
            self.save()
        return True

    def end_phase(self) -> None:  # noqa: B027
        """Called after the last step of a phase, before its checkpoint."""

    def _train(self, phase: Phase, batch: Any) -> float:
        """One seeded optimizer step; returns its loss."""
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        loss = self.loss(batch)
        for parameter in self.parameters.values():
            parameter.grad = None
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        value = float(loss.detach())
        check_finite(f"step {self.step + 1}", value, float(norm))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak(group) * phase.rate(self.step) * group.get("scale", 1.0)
            optimizer.step()
        return value

    def save(self) -> None:
        """Write the checkpoint atomically."""
        if self.checkpoint is not None:
            replace_file(self.checkpoint, partial(torch.save, self._state()))

    def _state(self) -> dict[str, Any]:
        """Contents of a checkpoint, which `_resume` reads."""
        return {
            "identity": self.identity,
            "phase": self.phase,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "scores": dict(self.scores),
            "weights": {n: p.detach() for n, p in self.parameters.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def _resume(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.phase, self.step, self.seconds = state["phase"], state["step"], state["seconds"]
        self.history, self.scores = state["history"], RunningScores(state["scores"])
