"""Training of the `selector` reducer: network and evaluation (labels: `selector_labels`)."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from tokencomp.context import Attention, Reduction, Signal, VisualTokens
from tokencomp.evaluation.examples import Example
from tokencomp.reducers.base import Reducer, check_choice, top_k
from tokencomp.reducers.rows import given_scores
from tokencomp.reducers.selector import CHANNELS, SelectorNet
from tokencomp.training.data import questions
from tokencomp.training.loop import load_checkpoint
from tokencomp.training.measure import Measurement, Way
from tokencomp.training.relevance import Target
from tokencomp.training.selector_labels import Pair, label, label_identity
from tokencomp.weights import model_card, replace_file, write, write_json

SHARES = (0.5, 0.25, 0.1)
RATIOS = (0.5, 0.75, 0.9)
SETTINGS = ("epochs", "learning_rate", "batch_spans", "zeroed", "seed")
"""Of `SelectorConfig`: what the network depends on beside the labels."""


@dataclass(frozen=True)
class SelectorConfig:
    """What `tokencomp train selector` can be told.

    Attributes
    ----------
    samples
        Questions to explain; the paper has 8 to 12 thousand per model and modality.
    kind
        "image", "video" or "both" of the embedded benchmark; files hold what they hold.
    batch
        Questions explained at once.
    epochs, learning_rate, batch_spans
        Of the network.
    zeroed
        Share of each label's lowest values that is set to zero.
    answers
        "generated": explain what the model says (the paper); "given": the reference answer.
    target
        "logit" or "logprob" of the answer tokens.
    frames
        Frames read from video files.
    max_new_tokens
        Longest answer that is generated and explained.
    held_out, evaluate
        Held-out questions that are explained, and that are answered under compression.
    seed
        Of the order of the questions and spans, and of the network's first weights.
    """

    samples: int = 8000
    kind: str = "both"
    batch: int = 16
    epochs: int = 20
    learning_rate: float = 2e-3
    batch_spans: int = 64
    zeroed: float = 0.5
    answers: str = "generated"
    target: Target = "logit"
    frames: int = 8
    max_new_tokens: int = 16
    held_out: int = 500
    evaluate: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("selector", "answers", self.answers, ("generated", "given"))
        check_choice("selector", "target", self.target, ("logit", "logprob"))


def train_selector(
    model: Any, processor: Any, data: str, output: Path, config: SelectorConfig
) -> Path:
    """Labels → network → evaluation → `selector.safetensors` and `selector.json` in `output`.

    Labels are kept in `output/labels`, network checkpoints in `output/checkpoint.pt`: a run that
    was killed goes on where it was.

    Raises
    ------
    OptionError
        Data without answers or media; an output folder with labels, or a checkpoint, of another
        model, data set or setting.
    """
    begin = time.time()
    parts = {}
    identity = label_identity(model, data, config)
    for purpose, total in (("train", config.samples), ("validation", config.held_out)):
        source, folder = questions(data, config.kind, total, purpose), output / "labels" / purpose
        parts[purpose] = label(model, processor, source, folder, config, identity)
    identity |= {"samples": config.samples, "held_out": config.held_out}
    checkpoint = output / "checkpoint.pt"
    net = fit(parts["train"], parts["validation"], config, checkpoint, labels=identity)
    card = {
        **model_card(model),
        "kind": "selector",
        "layer": 0,
        "input": "attention of text rows, mean over heads",
        "channels": list(net.channels),
        "data": data,
        "config": asdict(config),
        "spans": len(parts["train"]),
        "held_out": agreement(net, parts["validation"]),
        "seconds": round(time.time() - begin, 1),
    }
    path = write(output / "selector.safetensors", net.state_dict(), card)
    if config.evaluate:
        source = questions(data, config.kind, config.evaluate, "validation")
        card["accuracy"] = accuracy(model, processor, source, path, config)
        write_json(path.with_suffix(".json"), card)
    return path


@dataclass(frozen=True)
class AttentionRow(Reducer):
    """The tokens that the user's text attends to most in layer 0: the selector's raw input."""

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Attention("text")})

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        return Reduction(top_k(given_scores(tokens, "attention"), tokens.special, keep))


def ways(weights: Path, ratios: Sequence[float], oracle: bool = False) -> list[Way]:
    """The selector and what it is measured against."""
    found = []
    for ratio in ratios:
        found += [Way("oracle", ratio, "oracle")] if oracle else []
        found += [
            Way("selector", ratio, "selector", {"weights": str(weights)}),
            Way("attention", ratio, AttentionRow()),
            Way("random", ratio, "random"),
        ]
    return found


def accuracy(
    model: Any, processor: Any, source: Sequence[Example], weights: Path, config: SelectorConfig
) -> list[dict[str, Any]]:
    """Held-out accuracy of the selector, the raw attention row and random choice."""
    measured = Measurement({"": model}, processor, config.frames, config.batch)
    measured.run(source, ways(weights, RATIOS), "evaluating")
    return measured.table(ways(weights, RATIOS))


def fit(
    train: list[Pair],
    held_out: list[Pair],
    config: SelectorConfig,
    checkpoint: Path | None = None,
    channels: tuple[int, ...] = CHANNELS,
    labels: dict[str, Any] | None = None,
) -> SelectorNet:
    """Train the network; of all epochs the one with the lowest held-out loss is returned.

    Parameters
    ----------
    checkpoint
        Written after every epoch; an existing one of the same settings and `labels` is resumed.
    labels
        Identity of the labels.

    Raises
    ------
    OptionError
        `checkpoint` belongs to another run.
    """
    torch.manual_seed(config.seed)
    net = SelectorNet(channels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=0.01)
    identity = {**(labels or {}), "channels": list(channels)}
    identity |= {name: getattr(config, name) for name in SETTINGS}
    state = load_checkpoint(checkpoint, identity)
    if state is None:
        state = {"identity": identity, "epoch": 0, "best": math.inf, "weights": net.state_dict()}
    else:
        net.load_state_dict(state["now"])
        optimizer.load_state_dict(state["optimizer"])
    bar = tqdm(range(state["epoch"], config.epochs), desc="training selector", mininterval=2)
    for epoch in bar:
        _train_epoch(net, optimizer, train, config, epoch)
        value = _loss(net, held_out, config)
        bar.set_postfix(held_out=f"{value:.3f}")
        if value < state["best"]:
            state["best"] = value
            state["weights"] = {k: v.clone() for k, v in net.state_dict().items()}
        state |= {"epoch": epoch + 1, "now": net.state_dict(), "optimizer": optimizer.state_dict()}
        if checkpoint is not None:
            replace_file(checkpoint, partial(torch.save, state))
    net.load_state_dict(state["weights"])
    return net.eval()


def _train_epoch(
    net: SelectorNet,
    optimizer: torch.optim.Optimizer,
    pairs: list[Pair],
    config: SelectorConfig,
    epoch: int,
) -> None:
    """One pass over the spans; the learning rate falls linearly over all epochs."""
    net.train()
    batches = list(_batches(pairs, config, epoch))
    for number, (rows, labels) in enumerate(batches):
        done = (epoch + number / len(batches)) / config.epochs
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - done)
        optimizer.zero_grad()
        divergence(net(rows), labels, config.zeroed).backward()
        optimizer.step()


def target_of(labels: Tensor, zeroed: float) -> Tensor:
    """Distributions from relevance (B, n): the lowest share set to zero, the rest sums to 1."""
    drop = int(labels.shape[1] * zeroed)
    low = labels.sort(dim=1, stable=True).indices[:, :drop]
    kept = labels.scatter(1, low, 0.0)
    return kept / kept.sum(1, keepdim=True).clamp(min=1e-30)


def divergence(logits: Tensor, labels: Tensor, zeroed: float) -> Tensor:
    """KL divergence from the network's softmax to the labels, mean over spans."""
    return F.kl_div(logits.log_softmax(1), target_of(labels, zeroed), reduction="batchmean")


def _batches(pairs: list[Pair], config: SelectorConfig, epoch: int) -> Iterator[Pair]:
    """Spans of one length, in a shuffled order that (seed, epoch) decides."""
    by_length: dict[int, list[int]] = defaultdict(list)
    generator = torch.Generator().manual_seed(config.seed * 10_007 + epoch)
    for i in torch.randperm(len(pairs), generator=generator).tolist():
        if float(pairs[i][1].sum()) > 0:
            by_length[len(pairs[i][0])].append(i)
    groups = [
        same[at : at + config.batch_spans]
        for same in by_length.values()
        for at in range(0, len(same), config.batch_spans)
    ]
    for g in torch.randperm(len(groups), generator=generator).tolist():
        chosen = [pairs[i] for i in groups[g]]
        yield torch.stack([r for r, _ in chosen]), torch.stack([v for _, v in chosen])


@torch.no_grad()
def _loss(net: SelectorNet, pairs: list[Pair], config: SelectorConfig) -> float:
    net.eval()
    total, spans = 0.0, 0
    for rows, labels in _batches(pairs, config, 0):
        total += float(divergence(net(rows), labels, config.zeroed)) * len(rows)
        spans += len(rows)
    return total / max(spans, 1)


@torch.no_grad()
def agreement(net: SelectorNet, pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """Share of the relevance that the chosen tokens hold, at several budgets.

    "oracle" is the most any choice can hold; "attention" takes the top of the raw row; "random" is
    the expectation.
    """
    net.eval()
    found: dict[str, dict[str, float]] = {}
    for share in SHARES:
        held: dict[str, list[float]] = defaultdict(list)
        for row, truth in pairs:
            total = float(truth.sum())
            if total <= 0:
                continue
            k = max(1, round(share * len(row)))
            for name, score in (
                ("oracle", truth),
                ("selector", net(row[None])[0]),
                ("attention", row),
            ):
                held[name].append(float(truth[score.topk(k).indices].sum()) / total)
            held["random"].append(k / len(row))
        found[f"{share:g}"] = {name: sum(v) / len(v) for name, v in held.items()}
    return found
