"""Training of the selector's network on labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokencomp.errors import OptionError
from tokencomp.reducers.base import finite_values
from tokencomp.reducers.selector import CHANNELS, SelectorNet
from tokencomp.training.checks import check_finite
from tokencomp.training.selector.labels import Pair, SelectorConfig
from tokencomp.training.steps import Phase, Steps

SETTINGS = ("epochs", "learning_rate", "batch_spans", "zeroed", "seed")
"""Of `SelectorConfig`: what the network depends on in addition to the labels."""


def fit(
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    config: SelectorConfig,
    checkpoint: Path | None = None,
    channels: tuple[int, ...] = CHANNELS,
    labels: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[SelectorNet, float]:
    """Train the network; of all epochs the one with the lowest held-out loss is returned.

    `checkpoint` is written after every epoch; an existing one of the same settings and identity of
    the `labels` is resumed. Returns the network in evaluation mode, on `device`, and the seconds it
    took in all sessions together. Raises `OptionError` for a checkpoint of another run, or if no
    span can be learned from, `ScoreError` if training diverged.
    """
    torch.manual_seed(config.seed)
    spans, held = targets(train, config.zeroed), targets(held_out, config.zeroed)
    row = spans[0][0]
    net = SelectorNet(channels, row.shape[1] if row.ndim == 2 else 0).to(device)
    identity = {**(labels or {}), "channels": list(channels)}
    identity |= {name: getattr(config, name) for name in SETTINGS}
    run = Fit(net, spans, held, config, checkpoint, identity)
    run.run()
    net.load_state_dict(run.chosen)
    return net.eval(), run.seconds


@dataclass(frozen=True)
class Epoch(Phase):
    """One of `epochs` passes over the spans; the learning rate falls linearly over all."""

    number: int
    epochs: int

    def rate(self, step: int) -> float:
        return 1 - (self.number + step / self.steps) / self.epochs


class Fit(Steps):
    """Trains `net` on `spans`; `chosen`: its weights after the epoch with least loss on `held`."""

    clip = math.inf

    def __init__(
        self,
        net: SelectorNet,
        spans: list[Pair],
        held: list[Pair],
        config: SelectorConfig,
        checkpoint: Path | None,
        identity: dict[str, Any],
    ) -> None:
        self.net, self.spans, self.held, self.config = net, spans, held, config
        self.best, self.chosen = math.inf, net.state_dict()
        steps, count = -(-len(spans) // config.batch_spans), config.epochs
        epochs = [Epoch(f"epoch {i + 1}", steps, number=i, epochs=count) for i in range(count)]
        adamw = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=0.01)
        named = dict(net.named_parameters())
        super().__init__(epochs, named, [adamw], checkpoint, identity, config.seed, steps)

    def batches(self) -> list[list[Pair]]:
        self.net.train()
        return list(_batches(self.spans, self.config, self.phase))[self.step :]

    def loss(self, batch: list[Pair]) -> Tensor:
        rows, target, real = _padded(batch, self.net)
        return divergence(self.net(rows, real), target)

    def peak(self, group: dict[str, Any]) -> float:
        return self.config.learning_rate

    def end_phase(self) -> None:
        value = _loss(self.net, self.held, self.config)
        check_finite(f"epoch {self.phase + 1}", value)
        if value < self.best:
            self.best = value
            self.chosen = {k: v.clone() for k, v in self.net.state_dict().items()}

    def _state(self) -> dict[str, Any]:
        chosen = {"best": self.best, "chosen": self.chosen, "net": self.net.state_dict()}
        return {**super()._state(), **chosen}  # the net with statistics of its batch norm

    def _resume(self, state: dict[str, Any]) -> None:
        super()._resume(state)
        self.net.load_state_dict(state["net"])
        self.best, self.chosen = state["best"], state["chosen"]


def targets(pairs: Sequence[Pair], zeroed: float) -> list[Pair]:
    """Inputs of the network, and target distributions (n,), float32.

    Relevance becomes a distribution: the lowest share `zeroed` is set to zero, the rest sums to 1.
    Spans of one token and spans without relevance are excluded.
    """
    targets = []
    for row, label in pairs:
        finite_values(row, "attention shares or features")
        label = finite_values(label, "relevances")
        low = label.sort(stable=True).indices[: int(len(label) * zeroed)]
        kept = label.scatter(0, low, 0.0)
        if len(row) > 1 and float(kept.sum()) > 0:
            targets.append((row, kept / kept.sum()))
    if not targets:
        raise OptionError(
            f"none of {len(pairs)} images and videos can be learned from: each has a single token, "
            "or no token with relevance to its answer. Give more or other data."
        )
    return targets


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL divergence from the network's softmax to distributions (B, n), mean over spans."""
    return F.kl_div(logits.log_softmax(1), target, reduction="batchmean")


@torch.no_grad()
def _loss(net: SelectorNet, spans: list[Pair], config: SelectorConfig) -> float:
    net.eval()
    total = 0.0
    for chosen in _batches(spans, config, 0):
        rows, target, real = _padded(chosen, net)
        total += float(divergence(net(rows, real), target)) * len(chosen)
    return total / len(spans)


def _batches(spans: list[Pair], config: SelectorConfig, epoch: int) -> Iterator[list[Pair]]:
    """Batches of spans of similar length, in an order that depends on (seed, epoch)."""
    generator = torch.Generator().manual_seed(config.seed * 10_007 + epoch)
    mixed = [spans[i] for i in torch.randperm(len(spans), generator=generator).tolist()]
    mixed.sort(key=lambda pair: len(pair[0]))
    groups = range(0, len(mixed), config.batch_spans)
    for g in torch.randperm(len(groups), generator=generator).tolist():
        yield mixed[groups[g] : groups[g] + config.batch_spans]


def _padded(spans: list[Pair], net: SelectorNet) -> tuple[Tensor, Tensor, Tensor | None]:
    """Padded rows (B, n, …), targets and mask of real rows (B, n) on the net's device.

    The mask is None without padding.
    """
    device = next(net.parameters()).device
    rows = pad_sequence([row for row, _ in spans], batch_first=True)
    targets = pad_sequence([target for _, target in spans], batch_first=True)
    lengths = torch.tensor([[len(row)] for row, _ in spans])
    real = torch.arange(rows.shape[1]) < lengths
    full = bool(real.all())
    return rows.to(device), targets.to(device), None if full else real.to(device)
