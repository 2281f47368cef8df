"""Selection by a small network that learned what explains the model's answers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokencomp.errors import OptionError, WeightsError
from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import (
    best_rows,
    finite_features,
    finite_values,
    min_max,
    supplied_scores,
)
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import Attention, Signal
from tokencomp.tokens.spans import ModelFacts
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, real
from tokencomp.tokens.tokens import Tokens

TRAIN = "tokencomp train selector --model MODEL --data DATA --output FOLDER"
CHANNELS = (32, 64, 128, 256, 512)
Input = Literal["attention", "features"]
INPUTS: dict[Input, str] = {
    "attention": "attention of text rows, mean over heads",
    "features": "projected visual features",
}
"""What a network may read, and how its card calls it."""
NARROW = (32, 32, 32)
"""Channels of a network of features (ours); `CHANNELS` learns its labels by heart."""


class SelectorNet(nn.Module):
    """One-dimensional CNN from an attention row to importance logits (arXiv 2506.01097).

    Depthwise-separable convolutions of kernel 3 with batch norm and ReLU, then one 1×1
    convolution; works for any number of tokens. Kernel, norm and input scaling are ours, and so is
    the network that reads features: a linear projection of every standardised token comes first.

    Parameters
    ----------
    channels
        Output channels of every layer; the paper has five, from 32 to 512.
    features
        Width of the visual features that it reads instead of an attention row; 0: it reads a row.
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
        """Importance of every token; its softmax over n is the predicted relevance.

        Parameters
        ----------
        rows : Tensor, shape (B, n), or (B, n, d) if it reads features
            Attention rows, or features in any scale; shorter ones end in zeros.
        real : Tensor of bool, shape (B, n), or None
            False at these zeros, which take no part in the batch norm. None: there are none.

        Returns
        -------
        Tensor, float32, shape (B, n)
            Logits, the lowest finite number where nothing is real.
        """
        if self.stem is None:
            x = scaled(rows, real)[:, None]
        else:
            if rows.shape[-1] != self.stem.in_features:
                raise OptionError(
                    f"selector: visual tokens of width {rows.shape[-1]}, and the network reads "
                    f"{self.stem.in_features}. Train weights for this model: {TRAIN}"
                )
            x = self.stem(standardised(rows)).transpose(1, 2)
        for layer in self.layers:
            if real is not None and isinstance(layer, nn.BatchNorm1d):
                x = _real_columns(layer, x, real)
            else:
                x = layer(x)
        logits: Tensor = self.head(x)[:, 0]
        return logits if real is None else logits.masked_fill(~real, torch.finfo(x.dtype).min)


def _real_columns(layer: nn.Module, x: Tensor, real: Tensor) -> Tensor:
    """`layer` on the real columns of x (B, C, n), zeros elsewhere."""
    if not layer.training:  # then columns do not depend on each other
        every: Tensor = layer(x)
        return every.masked_fill(~real[:, None], 0)
    columns = x.transpose(1, 2)
    out = torch.zeros_like(columns)
    out[real] = layer(columns[real])
    return out.transpose(1, 2)


def scaled(rows: Tensor, real: Tensor | None = None) -> Tensor:
    """Log of a row over its mean: attention shares shrink with the length, this does not."""
    count = rows.shape[-1] if real is None else real.sum(-1, keepdim=True)
    mean = (rows.sum(-1, keepdim=True) / count).clamp(min=1e-12)
    x = torch.log(rows / mean + 0.01)
    return x if real is None else x * real


def standardised(features: Tensor) -> Tensor:
    """Features (…, d) with mean 0 and variance 1 over d, float32; zeros stay zeros."""
    return F.layer_norm(features.float(), features.shape[-1:])


@lru_cache(maxsize=8)
def _load(path: Path, modified: int) -> tuple[SelectorNet, dict[str, Any]]:
    from tokencomp.trained.cards import read

    tensors, card = read(path, "selector")
    if card.get("layer", 0) != 0:
        raise WeightsError(
            f"{path} was trained on attention of layer {card['layer']!r}, not 0. Train one: {TRAIN}"
        )
    try:
        features = card["hidden_size"] if input_of(card, path) == "features" else 0
        net = SelectorNet(tuple(card["channels"]), features)
        net.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise WeightsError(
            f"{path} does not hold a selector ({error}). Train one: {TRAIN}"
        ) from error
    return net.eval().requires_grad_(False), card


def input_of(card: dict[str, Any], path: str | Path, wanted: Input | None = None) -> Input:
    """What the network of a card reads; a `WeightsError` if it is not known, or not `wanted`."""
    named = card.get("input", INPUTS["attention"])
    taken = next((name for name, text in INPUTS.items() if text == named), None)
    if taken is None:
        raise WeightsError(
            f"{path} reads {named!r}, and selectors read {' or '.join(INPUTS.values())}. Copy both "
            f"files of a finished training run, or train again: {TRAIN}"
        )
    if wanted not in (None, taken):
        raise WeightsError(
            f"{path} was trained to read {taken}, not {wanted}. Give input={taken!r}, or other "
            f"weights: {TRAIN} --input {wanted}"
        )
    return taken


@lru_cache(maxsize=8)
def on_device(net: SelectorNet, device: torch.device) -> SelectorNet:
    """`net`, or its copy on another device, which is made once."""
    return net if net.head.weight.device == device else copy.deepcopy(net).to(device)


def load_selector(path: str | Path) -> tuple[SelectorNet, dict[str, Any]]:
    """A trained selector on the CPU and its card, loaded once."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist. Train a selector: {TRAIN}")
    return _load(path.absolute(), path.stat().st_mtime_ns)


@register_reducer("selector")
@dataclass(frozen=True)
class Selector(Reducer):
    """Keep the tokens that, to a trained network, explain the answer best (arXiv 2506.01097).

    The only input of the paper's network is layer 0's attention from the user's text to the visual
    tokens. For it, that layer's input norm, q, k and rotary embedding run before the decoder does;
    the attention backend is not changed. A network that was trained with `--input features` (ours)
    reads the projected visual features instead, and no question: it needs nothing of the decoder,
    so that servers can run it. On images it is level with `kcenter`, which needs no training, on
    the tiny Qwen2-VL, and with `pick="top"` behind the attention at 0.9
    (`benchmarks/accuracy/selector_features.md`). No weights of this kind ship.

    Attributes
    ----------
    weights : str or None
        `selector.safetensors`, or the folder that holds it. None: in the
        model's folder or its subfolder `tokencomp`.
    pick
        "top": the most important tokens. "mmr": one by one those of the largest
        I - max cos(x_i, x_j) over the chosen j, I the importance scaled to 0 … 1 in the span. This
        is the rule of IDPruner (arXiv 2602.13315) with its λ of 0.5; its importance is the raw
        output of VisionSelector, ours are this network's logits.
    input
        What the network must have been trained on: "attention" or "features". None: whatever its
        weights say. Servers of vLLM and SGLang must know it before they load weights.

    Raises
    ------
    WeightsError
        On `patch`: weights that are missing, damaged, of another model or for another input.
    """

    weights: str | None = None
    # Not in the repr, by which stored answers know a method; theirs stands among their options.
    pick: Literal["top", "mmr"] = field(default="top", repr=False)
    input: Input | None = field(default=None, repr=False)

    traits = Traits(grid="known", batched=True, entry_only=True)
    summary = "trained on explainability labels (2506.01097), pick=mmr: IDPruner (2602.13315)"

    def __post_init__(self) -> None:
        if isinstance(self.weights, PathLike):  # text, so that options are ready for JSON
            object.__setattr__(self, "weights", fspath(self.weights))
        super().__post_init__()

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset() if self.input == "features" else frozenset({Attention("text")})

    def bind(self, facts: ModelFacts) -> Selector:
        from tokencomp.trained.cards import check_card, locate

        path = locate(self.weights, facts, "selector", TRAIN).absolute()
        net, card = load_selector(path)
        check_card(card, facts, path, TRAIN)
        taken = input_of(card, path, self.input)
        bound = Selector(str(path), self.pick, taken)
        vars(bound)["_net"] = net  # the one that was checked, even if its file changes later
        return bound

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
        """Importance of every patch, (n,); the network reads `given`, its row per patch."""
        net = on_device(self._net, given.device)

        def of_stack(_: HostIndex, stack: Stack, rows: Tensor) -> Tensor:
            inside = None
            if not stack.even:
                inside = torch.from_numpy(real(stack.lengths)).to(rows.device)
                rows = rows * inside.view(*inside.shape, *[1] * (rows.ndim - 2))
            logits: Tensor = net(rows, inside)
            return logits

        with torch.no_grad():
            return by_stack(tokens.lengths, of_stack, given)

    @cached_property
    def _net(self) -> SelectorNet:
        """The trained network on the CPU, loaded once."""
        if self.weights is None:
            raise OptionError(f"selector: weights=None outside patch(). Train some: {TRAIN}")
        net, card = load_selector(self.weights)
        input_of(card, self.weights, self.input or "attention")
        return net
