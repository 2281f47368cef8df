"""Training of the `selector` reducer, from labels to weights, and its evaluation."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokencomp.evaluation.settings import Setting
from tokencomp.plan.options import Traits
from tokencomp.reducers.base import ScoreReducer, supplied_scores
from tokencomp.reducers.selector import CHANNELS, INPUTS, NARROW, SelectorNet
from tokencomp.storage import write_json
from tokencomp.tokens.signals import Attention, Signal
from tokencomp.tokens.tokens import Tokens
from tokencomp.trained.cards import model_card, write
from tokencomp.training.checks import check_folder, without_patch
from tokencomp.training.data import questions
from tokencomp.training.measure import accuracy
from tokencomp.training.selector.fit import fit
from tokencomp.training.selector.labels import Pair, SelectorConfig, label, label_identity

SHARES = (0.5, 0.25, 0.1)
RATIOS = (0.5, 0.75, 0.9)


@without_patch
def train_selector(
    model: Any, processor: Any, data: str, output: Path, config: SelectorConfig
) -> Path:
    """Labels → network → evaluation → `selector.safetensors` and `selector.json` in `output`.

    Labels are stored in `output/labels`, network checkpoints in `output/checkpoint.pt`: a killed
    run resumes there. Raises `OptionError` for data without answers or media, labels without any
    relevance, or files of another model, data set or setting in `output`, and `ScoreError` for
    attention, relevance or training that is not finite.
    """
    check_folder(output)
    parts, seconds = {}, 0.0
    identity = label_identity(model, data, config)
    for purpose, total in (("train", config.samples), ("validation", config.held_out)):
        source, folder = questions(data, config.kind, total, purpose), output / "labels" / purpose
        parts[purpose], took = label(model, processor, source, folder, config, identity)
        seconds += took
    identity |= {"samples": config.samples, "held_out": config.held_out}
    net, took = fit(
        parts["train"],
        parts["validation"],
        config,
        output / "checkpoint.pt",
        NARROW if config.input == "features" else CHANNELS,
        labels=identity,
        device=model.device,
    )
    card = {
        **model_card(model),
        "kind": "selector",
        "layer": 0,
        "input": INPUTS[config.input],
        "channels": list(net.channels),
        "data": data,
        "config": asdict(config),
        "spans": len(parts["train"]),
        "held_out": agreement(net, parts["validation"]),
        "seconds": round(seconds + took, 1),
    }
    path = write(output / "selector.safetensors", net.state_dict(), card)
    if config.evaluate:
        source = questions(data, config.kind, config.evaluate, "validation")
        card["accuracy"] = accuracy({"": model}, processor, source, comparison(path), config)
        write_json(path.with_suffix(".json"), card)
    return path


@dataclass(frozen=True)
class AttentionRow(ScoreReducer):
    """The tokens with most attention of the user's text in layer 0: the selector's input."""

    traits = Traits(batched=True)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Attention("text")})

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return supplied_scores(tokens, "attention")


def comparison(weights: Path) -> list[Setting]:
    """The selector and its baselines at every ratio."""
    settings = []
    for ratio in RATIOS:
        settings += [
            Setting("selector", ratio, {"weights": str(weights)}),
            Setting(AttentionRow(), ratio, name="attention"),
            Setting("random", ratio),
        ]
    return settings


@torch.no_grad()
def agreement(net: SelectorNet, pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """Share of the relevance that the kept tokens hold, at several budgets.

    "oracle" is the maximum over all choices; "attention" takes the top of the raw row, if the
    network reads one; "random" is the expectation.
    """
    device = next(net.parameters()).device
    held: dict[tuple[float, str], list[float]] = defaultdict(list)
    for row, truth in pairs:
        total = float(truth.sum())
        if total <= 0:
            continue
        scores = {"oracle": truth, "selector": net(row[None].to(device))[0].cpu()}
        if row.ndim == 1:
            scores["attention"] = row
        for share in SHARES:
            k = max(1, round(share * len(row)))
            for name, score in scores.items():
                held[share, name].append(float(truth[score.topk(k).indices].sum()) / total)
            held[share, "random"].append(k / len(row))
    names = ("oracle", "selector", "attention", "random")
    return {
        f"{share:g}": {name: sum(v) / len(v) for name in names if (v := held[share, name])}
        for share in SHARES
    }
