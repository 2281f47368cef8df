"""Selection by a small network that learned what explains the model's answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.context import Attention, Reduction, Signal, VisualTokens
from tokencomp.errors import OptionError, WeightsError
from tokencomp.reducers.base import Reducer, register_reducer, top_k
from tokencomp.reducers.rows import given_scores

TRAIN = "tokencomp train selector --model MODEL --data DATA --output FOLDER"
CHANNELS = (32, 64, 128, 256, 512)


class SelectorNet(nn.Module):
    """One-dimensional CNN from an attention row to importance logits (arXiv 2506.01097).

    Depthwise-separable convolutions of kernel 3 with batch norm and ReLU, then one 1×1
    convolution; works for any number of tokens. Kernel, norm and input scaling are ours.

    Parameters
    ----------
    channels
        Output channels of every layer; the paper has five, from 32 to 512.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.channels = tuple(channels)
        layers, width = [], 1
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

    def forward(self, rows: Tensor) -> Tensor:
        """Logits (B, n) of attention rows (B, n); softmax over n is the predicted relevance."""
        return self.head(self.layers(scaled(rows)[:, None]))[:, 0]


def scaled(rows: Tensor) -> Tensor:
    """Log of a row over its mean: attention shares shrink with the length, this does not."""
    mean = rows.mean(-1, keepdim=True).clamp(min=1e-12)
    return torch.log(rows / mean + 0.01)


@lru_cache(maxsize=8)
def _load(path: Path, modified: int, device: torch.device) -> tuple[SelectorNet, dict[str, Any]]:
    from tokencomp.weights import read

    tensors, card = read(path)
    try:
        net = SelectorNet(tuple(card["channels"]))
        net.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise WeightsError(
            f"{path} does not hold a selector ({error}). Train one: {TRAIN}"
        ) from error
    return net.eval().requires_grad_(False).to(device), card


def load_selector(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[SelectorNet, dict[str, Any]]:
    """A trained selector and its card, loaded once per device.

    Raises
    ------
    WeightsError
        Missing, broken or not a selector.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist. Train a selector: {TRAIN}")
    return _load(path.resolve(), path.stat().st_mtime_ns, torch.device(device))


@register_reducer("selector")
@dataclass(frozen=True)
class Selector(Reducer):
    """Keep the tokens that a trained network expects the answer to rest on (arXiv 2506.01097).

    Its only input is layer 0's attention from the user's text to the visual tokens, for which the
    layer's input norm, q, k and rotary embedding run before the model does; the attention backend
    is left alone.

    Attributes
    ----------
    weights : str or None
        `selector.safetensors`, or the folder that holds it. None: in the
        model's folder or its subfolder `tokencomp`.

    Raises
    ------
    WeightsError
        On `patch`: no weights, or weights of another model.
    """

    weights: str | None = None

    summary = "trained on explainability labels, sees layer-0 attention (2506.01097)"

    def __post_init__(self) -> None:
        if isinstance(self.weights, PathLike):  # text, so that options are ready for JSON
            object.__setattr__(self, "weights", fspath(self.weights))
        super().__post_init__()

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Attention("text")})

    def for_model(self, model: nn.Module) -> Selector:
        from tokencomp.weights import check_card, locate

        path = locate(self.weights, model, "selector", TRAIN)
        check_card(load_selector(path)[1], model, path, TRAIN)
        return Selector(weights=str(path))

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        row = given_scores(tokens, "selector")
        if self.weights is None:
            raise OptionError(f"selector: weights=None outside patch(). Train some: {TRAIN}")
        scores = torch.zeros_like(row)
        scores[~tokens.special] = self._score(row[~tokens.special])
        return Reduction(top_k(scores, tokens.special, keep))

    @torch.no_grad()
    def _score(self, row: Tensor) -> Tensor:
        """Logits of a span's patches, float32, on their device."""
        net, _ = load_selector(self.weights, row.device)  # type: ignore[arg-type]
        return net(row[None])[0]
