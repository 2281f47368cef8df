"""The optimizer loop of trained methods: deterministic order, checkpoints, resumption."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from tokencomp.engine.question import IGNORED
from tokencomp.inputs.prompts import to_model
from tokencomp.inputs.questions import Example
from tokencomp.storage import replace_file
from tokencomp.training.checks import check_finite, check_rate, load_checkpoint
from tokencomp.training.data import answer_ids, append, batches, load_batch
from tokencomp.validation import check_types

NOT_IN_IDENTITY = ("evaluate", "ratios", "save_every")
"""Settings that do not change the trained weights."""
SAVE_SECONDS = 60.0
"""Longest time between checkpoints: what a kill may cost, and the step it falls in."""


@dataclass(frozen=True)
class LoopConfig:
    """How a module is trained.

    Attributes
    ----------
    steps, batch
        Optimizer steps, questions per step.
    learning_rate, warmup, weight_decay
        AdamW with linear warm-up over `warmup` steps and cosine decay to a twentieth.
    samples, kind
        Training questions, and "image", "video" or "both" of the embedded benchmark.
    frames
        Frames read from video files.
    save_every
        Steps between checkpoints, if they do not take longer than `SAVE_SECONDS`.
    evaluate
        Held-out questions answered at the end; 0: none.
    seed
        Of the order of the questions, and of the first weights.

    Raises
    ------
    OptionError
        A value of another type, or a learning rate outside (0, 1].
    """

    steps: int = 1000
    batch: int = 16
    learning_rate: float = 1e-3
    warmup: int = 30
    weight_decay: float = 0.0
    samples: int = 8000
    kind: str = "both"
    frames: int = 8
    save_every: int = 100
    evaluate: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_types("training", self)
        check_rate(self.learning_rate)

    def identity(self) -> dict[str, Any]:
        """The settings that must be equal for a checkpoint to be resumed, as JSON-like values."""
        settings = {k: v for k, v in asdict(self).items() if k not in NOT_IN_IDENTITY}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


Loss = Callable[[dict[str, Any], Tensor], Tensor]


class Loop:
    """Trains `module` on questions; the same seed gives the same batches, also after a restart.

    Parameters
    ----------
    model, processor
        The model that answers.
    module
        Holds the trainable parameters: those with `requires_grad`.
    source
        Training questions.
    checkpoint
        Written every `save_every` steps and every `SAVE_SECONDS`; an existing one of the same
        `identity` is resumed.

    Attributes
    ----------
    step, history, seconds
        Steps done, their losses, and the time they took, in all sessions together.

    Raises
    ------
    OptionError
        `checkpoint` cannot be written, cannot be read, or belongs to another run.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        module: nn.Module,
        source: Sequence[Example],
        config: LoopConfig,
        checkpoint: Path,
        identity: dict[str, Any],
    ) -> None:
        self.model, self.processor, self.source = model, processor, source
        self.config, self.checkpoint, self.identity = config, checkpoint, identity
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step, self.history, self.seconds = 0, list[float](), 0.0
        self._resume()

    def run(self, before: Callable[[int], None], loss: Loss, title: str) -> None:
        """Train to the last step. `before(step)` may set what depends on the step.

        Raises
        ------
        ScoreError
            A loss or gradient is NaN or infinite; the last checkpoint stays.
        """
        steps = self.config.steps
        chosen = batches(self.source, self.config.batch, self.config.seed)
        chosen = itertools.islice(chosen, self.step, steps)
        bar = tqdm(chosen, desc=title, initial=self.step, total=steps, mininterval=2)
        saved = time.monotonic()
        begin = saved - self.seconds
        for indices in bar:
            before(self.step)
            self.history.append(self._train(loss, [self.source[i] for i in indices]))
            self.step += 1
            self.seconds = time.monotonic() - begin
            bar.set_postfix(loss=f"{sum(self.history[-50:]) / len(self.history[-50:]):.3f}")
            late = time.monotonic() - saved >= SAVE_SECONDS
            if late or self.step % self.config.save_every == 0 or self.step == steps:
                self.save()
                saved = time.monotonic()

    def _train(self, loss: Loss, examples: list[Example]) -> float:
        """One optimizer step, which dropout too makes the same after a restart; its loss."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
        value = loss(*self._batch(examples))
        self.optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        loss_value = float(value.detach())
        check_finite(f"step {self.step + 1}", loss_value, float(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._rate()
        self.optimizer.step()
        return loss_value

    def _rate(self) -> float:
        done = self.step / max(1, self.config.steps)
        return min(1.0, (self.step + 1) / max(1, self.config.warmup)) * (
            0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
        )

    def _batch(self, examples: list[Example]) -> tuple[dict[str, Any], Tensor]:
        inputs, answers = load_batch(examples, self.processor, self.config.frames)
        forced, labels = append(inputs, answer_ids(self.processor, self.model, answers, end=True))
        return to_model(forced, self.model), labels.to(self.model.device)

    def report(self) -> dict[str, Any]:
        """What a card says of the run: seconds, and some 50 of its losses."""
        losses = self.history[:: max(1, len(self.history) // 50)]
        return {"seconds": round(self.seconds, 1), "loss": [round(v, 4) for v in losses]}

    def save(self) -> None:
        """Write the checkpoint; a kill leaves the previous one intact."""
        state = {
            "identity": self.identity,
            "step": self.step,
            "history": self.history,
            "seconds": self.seconds,
            "weights": {n: p.detach() for n, p in self.named.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        replace_file(self.checkpoint, partial(torch.save, state))

    def _resume(self) -> None:
        if (state := load_checkpoint(self.checkpoint, self.identity)) is None:
            return
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]
        self.seconds = state.get("seconds", 0.0)


def answer_loss(model: Any, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """Cross entropy of the answers, int64 `labels` (B, L) as `append` makes them.

    Logits are computed for the last columns alone. Under a patch the columns from the first answer
    token on count as drafted tokens, which do not influence what is kept. As all answers of a batch
    begin in one column, every sample keeps what it keeps at inference.
    """
    targets = labels[:, int((labels != IGNORED).any(0).nonzero()[0]) :]
    last = targets.shape[1] + 1
    logits = model(**inputs, use_cache=False, logits_to_keep=last).logits[:, -last:-1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
