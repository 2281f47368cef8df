"""A small network trained to predict which tokens explain the answer (arXiv 2506.01097)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencomp.errors import WeightsError
from tokencomp.reducers import Kept, Tokens, Traits, register_reducer
from tokencomp.reducers._batch import min_max
from tokencomp.reducers._trained import Card, TrainedReducer, moved
from tokencomp.reducers.base import best_rows, finite_features, finite_values, supplied_scores
from tokencomp.tokens.signals import Attention, Signal
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, real

TRAIN = "tokencomp train selector --model MODEL --data DATA --output FOLDER"
CHANNELS = (32, 64, 128, 256, 512)
Input = Literal["attention", "features"]
INPUTS: dict[Input, str] = {
    "attention": "attention of text rows, mean over heads",
    "features": "projected visual features",
}
"""Inputs that a network can read, and their names on its card."""
NARROW = (32, 32, 32)
"""Channels of a network that reads features (ours); with `CHANNELS` it overfits."""


class SelectorNet(nn.Module):
    """One-dimensional CNN from attention rows to importance logits (arXiv 2506.01097).

    Depthwise-separable convolutions of kernel 3 with batch norm and ReLU, then a 1×1 convolution;
    works for any number of tokens. Kernel, norm and input scaling are ours, as is the network that
    reads features, which begins with a linear projection of every standardised token.

    `channels` are the output channels of every layer; the paper has five, from 32 to 512.
    `features` is the width of the visual features that it reads; 0: it reads an attention row.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS, features: int = 0) -> None:
        super().__init__()
        self.channels = tuple(channels)
        width = self.channels[0] if features else 1
        self.stem = nn.Linear(features, width, bias=False) if features else None
        layers: list[nn.Module] = []
        for out in self.channels:
            layers += [
                nn.Conv1d(width, width, 3, padding=1, groups=width, bias=False),
                nn.Conv1d(width, out, 1, bias=False),
                nn.BatchNorm1d(out),
                nn.ReLU(),
            ]
            width = out
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv1d(width, 1, 1)

    def forward(self, rows: Tensor, real: Tensor | None = None) -> Tensor:
        """Importance logits (B, n), float32; their softmax over n is the predicted relevance.

        `rows` are attention rows (B, n), or features (B, n, d) in any scale; shorter ones are
        padded with zeros. `real`, bool (B, n), is False at padding, which does not enter the batch
        norm and gets the lowest finite logit.
        """
        if self.stem is None:
            x = scaled(rows, real)[:, None]
        else:
            x = self.stem(standardised(rows)).transpose(1, 2)
        for layer in self.layers:
            if real is not None and isinstance(layer, nn.BatchNorm1d):
                x = _real_columns(layer, x, real)
            else:
                x = layer(x)
        logits: Tensor = self.head(x)[:, 0]
        return logits if real is None else logits.masked_fill(~real, torch.finfo(x.dtype).min)


def _real_columns(layer: nn.Module, x: Tensor, real: Tensor) -> Tensor:
    """Batch norm over the real columns of x (B, C, n); zeros at padding."""
    if not layer.training:  # batch norm with stored statistics treats columns independently
        every: Tensor = layer(x)
        return every.masked_fill(~real[:, None], 0)
    columns = x.transpose(1, 2)
    out = torch.zeros_like(columns)
    out[real] = layer(columns[real])
    return out.transpose(1, 2)


def scaled(rows: Tensor, real: Tensor | None = None) -> Tensor:
    """log(row / mean(row) + 0.01), which unlike the row does not shrink with its length."""
    count = rows.shape[-1] if real is None else real.sum(-1, keepdim=True)
    mean = (rows.sum(-1, keepdim=True) / count).clamp(min=1e-12)
    x = torch.log(rows / mean + 0.01)
    return x if real is None else x * real


def standardised(features: Tensor) -> Tensor:
    """Features (…, d) with mean 0 and variance 1 over d, float32; rows of zeros stay zeros."""
    return F.layer_norm(features.float(), features.shape[-1:])


def input_of(card: dict[str, Any], path: str | Path, wanted: Input | None = None) -> Input:
    """The input of the network of a card; `WeightsError` if it is unknown, or not `wanted`."""
    named = card.get("input", INPUTS["attention"])
    taken = next((name for name, text in INPUTS.items() if text == named), None)
    if taken is None or wanted not in (None, taken):
        wanted = wanted or "attention"
        raise WeightsError(
            f"{path} was trained to read {taken or named}, not {wanted}. Give other weights "
            f"({TRAIN} --input {wanted}), or input={taken!r}."
        )
    return taken


@register_reducer("selector")
@dataclass(frozen=True)
class Selector(TrainedReducer):
    """Keep the tokens that a trained network predicts to explain the answer (arXiv 2506.01097).

        I = net(mean over heads and text rows of the attention in layer 0)
        "top":  the tokens of largest I
        "mmr":  next = argmax_i  λ·I_i - (1 - λ)·max over kept j of cos(x_i, x_j),  λ = 0.5

    The second rule is IDPruner's (arXiv 2602.13315), with I min-max scaled in the span; its I is
    the raw output of VisionSelector, here it is this network's.

    To compute the attention, input norm, q, k and rotary embedding of layer 0 run before the
    decoder; the attention backend is not changed. A network trained with `--input features` (ours)
    reads the projected visual features instead, and not the question, so that servers can run it.
    On images of the tiny Qwen2-VL it is as accurate as `kcenter`, which needs no training, and at
    0.9 with `pick="top"` less accurate than the network of attention
    (`benchmarks/accuracy/selector_features.md`). No weights of this kind ship.

    Attributes
    ----------
    weights : str or None
        `selector.safetensors`, or the folder that holds it. None: in the model's folder or its
        subfolder `tokencomp`.
    pick
        "top" or "mmr".
    input
        What the network must have been trained on: "attention" or "features". None: whatever its
        weights say. vLLM and SGLang must know it before they load weights.

    Raises
    ------
    WeightsError
        On `patch`: weights that are missing, damaged, of another model or for another input.
    """

    # Not in the repr, which names the method in stored answers: they record options separately.
    pick: Literal["top", "mmr"] = field(default="top", repr=False)
    input: Input | None = field(default=None, repr=False)

    traits = Traits(grid="known", batched=True, entry_only=True)
    train = TRAIN
    summary = "trained on explainability labels (2506.01097), pick=mmr: IDPruner (2602.13315)"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset() if self.input == "features" else frozenset({Attention("text")})

    @classmethod
    def module_of(cls, card: Card, path: Path) -> SelectorNet:
        features = card["hidden_size"] if input_of(card, path) == "features" else 0
        return SelectorNet(tuple(card["channels"]), features)

    def with_weights(self, path: Path, card: Card) -> Selector:
        return replace(self, weights=str(path), input=input_of(card, path, self.input))

    def _loaded(self) -> tuple[nn.Module, Card]:
        net, card = super()._loaded()
        input_of(card, str(self.weights), self.input or "attention")
        return net, card

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import maxmin_select

        x = tokens.features
        row = supplied_scores(tokens, "selector") if self.needs else None
        if row is not None and self.pick == "top":
            finite_values(row, "scores")
        else:
            finite_features(x, row)
        importance = self.importances(tokens, x if row is None else row)
        if self.pick == "top":
            return Kept(best_rows(importance, tokens.budgets, tokens.lengths))
        # With λ = 0.5, λ·I - (1-λ)·max cos orders as I + min (1 - cos).
        how = {"spans": tokens.lengths, "bonus": min_max(importance, tokens.lengths)}
        return Kept(maxmin_select(x, tokens.budgets, **how))

    def importances(self, tokens: Tokens, given: Tensor) -> Tensor:
        """I of every patch, (n,), from the network's input `given`, one row per patch."""
        net = moved(self._module, given.device, torch.float32)

        def of_stack(_: HostIndex, stack: Stack, rows: Tensor) -> Tensor:
            mask = None
            if not stack.even:
                mask = stack.table(real(stack.lengths))
                rows = rows * mask.view(*mask.shape, *[1] * (rows.ndim - 2))
            logits: Tensor = net(rows, mask)
            return logits

        with torch.no_grad():
            return by_stack(tokens.lengths, of_stack, given)
