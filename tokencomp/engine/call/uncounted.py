"""Prompts at ratio 0 whose tokens are counted later.

A patch at ratio 0 changes nothing, and counting the tokens of a prompt costs device calls and host
reads. The arguments of the call are therefore stored, and counted when `handle.stats` is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.structure import feature_kind
from tokencomp.engine.call.later import first_layer
from tokencomp.engine.call.reading import PrefillCall, PromptReader
from tokencomp.engine.count.stats import Stats, collect
from tokencomp.errors import TokenCompError
from tokencomp.plan.plan import Plan
from tokencomp.torchlib import compat


def can_wait(adapter: Adapter, inputs: Mapping[str, Any]) -> bool:
    """Whether a call of the body starts a prompt that may hold media. Needs no device call.

    Parameters
    ----------
    inputs
        Arguments of the body by name.
    """
    layer = first_layer(compat.get_cache(inputs))
    if layer is not None and layer.is_initialized:
        return False
    in_place = inputs.get("inputs_embeds") is not None and inputs.get("input_ids") is None
    return in_place or bool(adapter.feature_kinds(inputs))


@dataclass(frozen=True)
class Pixels:
    """Shape and dtype of a pixel tensor, whose values are not needed to count tokens."""

    shape: torch.Size
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """A tensor of zeros of this shape that takes the memory of one number."""
        return torch.zeros((), dtype=self.dtype).expand(self.shape)


class UncountedPrompt:
    """The arguments of a prefill at ratio 0, without the values of pixels and without the cache.

    Parameters
    ----------
    arguments
        Arguments of the decoder by name, with no mask or a 2-D one.
    inputs
        Arguments of the body by name.
    labels
        Labels of a training call, or None.
    """

    def __init__(
        self, arguments: Mapping[str, Any], inputs: Mapping[str, Any], labels: Tensor | None
    ) -> None:
        self.arguments, self.labels = _without_cache(arguments), labels
        self.inputs = {
            name: Pixels(value.shape, value.dtype) if _is_pixels(name, value) else value
            for name, value in _without_cache(inputs).items()
        }

    @staticmethod
    def readable(arguments: Mapping[str, Any]) -> bool:
        """Whether a decoder call has no mask, or a 2-D padding mask, which takes little memory."""
        mask = arguments.get("attention_mask")
        return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)

    def stats(self, adapter: Adapter, reader: PromptReader) -> Stats | None:
        """The counts of the prompt; None where it brings no media or cannot be read."""
        inputs = {k: v.tensor() if isinstance(v, Pixels) else v for k, v in self.inputs.items()}
        try:
            with torch.no_grad():
                kinds = adapter.kinds(inputs)
                if kinds is None or not bool(kinds.any()):
                    return None
                call = PrefillCall(self.arguments, kinds.cpu(), None, inputs, self.labels, 0)
                return collect(reader.read(call, Plan())[0], None)
        except TokenCompError:
            return None


def _without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in compat.CACHE_NAMES}


def _is_pixels(name: str, value: Any) -> bool:
    """Whether an argument is a tensor of pixels, as opposed to token ids of audio."""
    tensor = isinstance(value, Tensor) and value.is_floating_point()
    return tensor and feature_kind(name) is not None
