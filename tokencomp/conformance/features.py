"""Random features in place of the output of a vision or audio tower.

They are returned by `get_image_features` (or `get_audio_features`), in the layout that the rest of
the model expects. The layout differs between families and releases, so all are tried.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokencomp.adapters.structure import deepstack_layers
from tokencomp.conformance.build import BuildError, TinyModel


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """What encoders of media return, with the fields that some families add."""

    deepstack_features: Any = None
    visual_indicator_features: Any = None
    vision_outputs: Any = None
    qformer_outputs: Any = None
    router_logits: Any = None
    audio_mask: Any = None


@dataclass(frozen=True)
class Layout:
    """The form of features of several images.

    "list" of (tokens, d) per image, "stacked" (images, tokens, d), or "flat" (all tokens, d).
    """

    pooled: str = "list"
    deep: str = "list"  # of the features that are added in the first layers
    whole: type = EncoderOutput  # class of the result; `Tensor` for features only

    def __str__(self) -> str:
        return f"{self.pooled}, deepstack {self.deep}"


def layouts() -> Iterator[Layout]:
    """All known layouts, frequent ones first."""
    for deep, pooled in itertools.product(("list", "flat"), ("list", "stacked", "flat")):
        yield Layout(pooled, deep)
    yield Layout("stacked", whole=Tensor)


def arranged(images: list[Tensor], how: str) -> Any:
    """Arrange features of all images, one tensor (tokens, d) each, in a layout."""
    if how == "list":
        return images
    return torch.stack(images) if how == "stacked" else torch.cat(images)


class Encoder:
    """Replaces the tower of a tiny model by its encoding method, and counts `calls` of it.

    `images` are the features (tokens, d) of the next call; their first `width` channels are
    returned, in the form of `layout`.
    """

    def __init__(self, tiny: TinyModel, medium: str) -> None:
        self.tiny = tiny
        self.layout, self.width = Layout(), tiny.text_config.hidden_size
        self.images: list[Tensor] = []
        self.calls = 0
        modules = [tiny.model, *(getattr(tiny.model, n, None) for n in ("base_model", "model"))]
        owners = dict.fromkeys(m for m in modules if isinstance(m, nn.Module))
        names = (f"get_{medium}_features", f"encode_{medium}s")  # the latter of VILA
        self._method = next((n for n in names for m in owners if hasattr(m, n)), "")
        if not self._method:
            raise BuildError(f"{type(tiny.model).__name__} has no {names[0]}")
        replaced = [m for m in owners if self._method in dir(m)]
        for module in replaced:
            self._replace(module)

    def _replace(self, module: Any) -> None:
        """Let a module of the tiny model return features, by a subclass of its class."""
        own = type(module)

        @functools.wraps(getattr(own, self._method))
        def features(module: Any, *args: Any, **kwargs: Any) -> Any:
            return self._output()

        names = {self._method: features, "__module__": own.__module__}
        module.__class__ = type(own.__name__, (own,), names)

    def _output(self) -> Any:
        self.calls += 1
        images = [f[:, : self.width] for f in self.images]
        if self.layout.whole is Tensor:
            return torch.stack(images)
        hidden = self.tiny.text_config.hidden_size
        deep = arranged([f[:, :hidden] * 0.3 for f in self.images], self.layout.deep)
        layers = getattr(self.tiny.config, "deepstack_layer_map", None)
        count = deepstack_layers(self.tiny.config) or 2  # some configs do not say how many
        stacked = torch.stack(images)
        return EncoderOutput(
            last_hidden_state=stacked,
            pooler_output=arranged(images, self.layout.pooled),
            deepstack_features=[(layer, deep) for _, layer in layers] if layers else [deep] * count,
            visual_indicator_features=torch.ones(8, hidden),
            audio_mask=torch.ones(stacked.shape[:2], dtype=torch.bool),
        )

    def widths(self) -> list[int]:
        """The decoder's width, and those of the inputs of projectors after the tower."""
        widths = [self.tiny.text_config.hidden_size]
        for name, module in self.tiny.model.named_modules():
            if isinstance(module, nn.Linear) and "projector" in name:
                widths.append(module.in_features)
        return list(dict.fromkeys(widths))[:3]
