"""The optimizer loop of trained methods: deterministic order, checkpoints, resumption."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from tokencomp.errors import OptionError
from tokencomp.evaluation.answering import to_model
from tokencomp.evaluation.examples import Example
from tokencomp.training.data import IGNORE, answer_ids, append, batches, load_batch
from tokencomp.weights import replace_file


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
        Steps between checkpoints.
    evaluate
        Held-out questions answered at the end; 0: none.
    seed
        Of the order of the questions, and of the first weights.
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
        Written every `save_every` steps; an existing one of the same `identity` is resumed.
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
        self.step, self.history = 0, list[float]()
        self._resume()

    def run(self, before: Callable[[int], None], loss: Loss, title: str) -> None:
        """Train to the last step. `before(step)` may set what depends on the step."""
        chosen = batches(self.source, self.config.batch, self.config.seed)
        chosen = itertools.islice(chosen, self.step, self.config.steps)
        bar = tqdm(chosen, desc=title, initial=self.step, total=self.config.steps, mininterval=2)
        for indices in bar:
            before(self.step)
            inputs, labels = self._batch([self.source[i] for i in indices])
            value = loss(inputs, labels)
            self.optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(self.named.values(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * self._rate()
            self.optimizer.step()
            self.step += 1
            self.history.append(float(value.detach()))
            bar.set_postfix(loss=f"{sum(self.history[-50:]) / len(self.history[-50:]):.3f}")
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self.save()

    def _rate(self) -> float:
        done = self.step / max(1, self.config.steps)
        return min(1.0, (self.step + 1) / max(1, self.config.warmup)) * (
            0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
        )

    def _batch(self, examples: list[Example]) -> tuple[dict[str, Any], Tensor]:
        inputs, answers = load_batch(examples, self.processor, self.config.frames)
        ids = answer_ids(self.processor, self.model, answers, end=True)
        forced, labels = append(inputs, ids)
        return to_model(forced, self.model), labels.to(self.model.device)

    def save(self) -> None:
        """Write the checkpoint; a kill leaves the previous one intact."""
        state = {
            "identity": self.identity,
            "step": self.step,
            "history": self.history,
            "weights": {n: p.detach() for n, p in self.named.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        replace_file(self.checkpoint, partial(torch.save, state))

    def _resume(self) -> None:
        state = load_checkpoint(self.checkpoint, self.identity)
        if state is None:
            return
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]


def load_checkpoint(path: Path | None, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state in `path`, on the CPU; None if there is no such file.

    Raises
    ------
    OptionError
        Its `identity` is another one.
    """
    if path is None or not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    check_same_run(path, state.get("identity", {}), identity)
    return state


def check_same_run(place: Path, found: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise `OptionError` if the run that left `found` in `place` is not the run `identity`."""
    wrong = [k for k in identity if found.get(k) != identity[k]]
    if wrong:
        raise OptionError(
            f"{place} belongs to a run that differs in {', '.join(wrong)}. Give another --output, "
            "or remove it."
        )


def answer_loss(model: Any, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """Cross entropy of the answers; logits are made for the last columns alone.

    Under a patch the trailing answer columns count as drafted tokens: they do not vote on what is
    kept, as at inference.
    """
    longest = int((labels != IGNORE).sum(1).max())
    logits = model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits
    told = labels[:, -longest:]
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), told.flatten(), ignore_index=IGNORE
    )
