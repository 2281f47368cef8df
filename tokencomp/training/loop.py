"""The optimizer loop of trained methods: deterministic order, checkpoints, resumption."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencomp.engine.prompt import IGNORED
from tokencomp.inputs.questions import Example
from tokencomp.training.data import answered, batches, data_identity, load_batch
from tokencomp.training.steps import Phase, Steps
from tokencomp.validation import check_types

NOT_IN_IDENTITY = ("evaluate", "ratios", "save_every")
"""Settings that do not change the trained weights."""


@dataclass(frozen=True)
class TrainingConfig:
    """Options that every training has. Raises `OptionError` for a value of another type."""

    batch: int = 16  # questions at once
    learning_rate: float = 1e-3  # of AdamW, which moves every weight by about that in a step
    samples: int = 8000  # training questions
    kind: str = "both"  # "image", "video" or "both" of the embedded benchmark, not of files
    frames: int = 8  # read from video files
    evaluate: int = 200  # held-out questions answered at the end; 0: none
    seed: int = 0  # of the order of the questions, and of the first weights

    def __post_init__(self) -> None:
        check_types("training", self)


@dataclass(frozen=True)
class LoopConfig(TrainingConfig):
    """Optimization of a module by AdamW, with warm-up and cosine decay to a twentieth."""

    steps: int = 1000  # of the optimizer
    warmup: int = 30  # steps, linear
    weight_decay: float = 0.0
    save_every: int = 100  # steps between checkpoints, unless they take longer than `SAVE_SECONDS`


Loss = Callable[[dict[str, Any], Tensor], Tensor]


class Loop(Steps):
    """Trains `module` on questions; the same seed gives the same batches, also after a restart.

    `model` answers, `objective` gives the loss of its inputs and labels, and the parameters of
    `module` with `requires_grad` are trained. A checkpoint in `output` is resumed if it is of the
    same settings, and of the model and data of the `card`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        module: nn.Module,
        source: Sequence[Example],
        config: LoopConfig,
        output: Path,
        card: dict[str, Any],
        objective: Loss,
    ) -> None:
        self.model, self.processor, self.source = model, processor, source
        self.config, self.objective = config, objective
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        adamw = torch.optim.AdamW(
            named.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        settings = {k: v for k, v in asdict(config).items() if k not in NOT_IN_IDENTITY}
        identity = {"fingerprint": card["fingerprint"], **data_identity(card["data"]), **settings}
        phases = [Phase("training", config.steps, warmup=config.warmup, end=0.05)]
        file = output / "checkpoint.pt"
        super().__init__(phases, named, [adamw], file, identity, config.seed, config.save_every)

    def batches(self) -> Iterator[list[Example]]:
        chosen = batches(self.source, self.config.batch, self.config.seed)
        for indices in itertools.islice(chosen, self.step, self.config.steps):
            yield [self.source[i] for i in indices]

    def loss(self, batch: list[Example]) -> Tensor:
        inputs, answers = load_batch(batch, self.processor, self.config.frames)
        return self.objective(*answered(self.model, self.processor, inputs, answers, end=True))

    def peak(self, group: dict[str, Any]) -> float:
        return self.config.learning_rate

    def report(self) -> dict[str, Any]:
        """For the card of a run: seconds, and about 50 of its losses."""
        losses = self.history[:: max(1, len(self.history) // 50)]
        return {"seconds": round(self.seconds, 1), "loss": [round(v, 4) for v in losses]}


def answer_loss(model: Any, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """Cross entropy of the answers, int64 `labels` (B, L) as `append` returns them.

    Only logits of the last columns are computed. Under a patch these columns count as draft tokens,
    which do not influence what is kept. All answers of a batch begin in one column, so every sample
    keeps the same tokens as at inference.
    """
    targets = labels[:, int((labels != IGNORED).any(0).nonzero()[0]) :]
    last = targets.shape[1] + 1
    logits = model(**inputs, use_cache=False, logits_to_keep=last).logits[:, -last:-1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
