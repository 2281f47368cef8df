"""Embeddings of decoders that put features of media in place themselves, as Chameleon's does.

Elsewhere the body of a model does that, and its decoder gets embeddings. Such a decoder gets token
ids and pixels instead, and would fill the placeholders in the call that is to be compressed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters.base import ENCODED
from tokencomp.adapters.structure import feature_modality
from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib import compat
from tokencomp.torchlib.views import shallow_copy


@dataclass
class _Reached(Exception):
    """Ends a call of a decoder at its first layer, with what the layer gets."""

    hidden: Tensor


class _FirstLayer(nn.Module):
    """Stands for the layers of a decoder."""

    def __getattr__(self, name: str) -> Any:
        # Decoders read the kind of a layer before they call it.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(hidden_states)


def with_embeddings(decoder: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a decoder call with embeddings, features in place, for token ids and features.

    A shallow copy of the decoder runs up to its first layer, so that the tower runs once.
    """
    clone = shallow_copy(decoder)
    clone._modules["layers"] = nn.ModuleList([_FirstLayer()])
    call = {k: v for k, v in arguments.items() if k not in (*compat.CACHE_NAMES, "use_cache")}
    try:
        type(clone).forward(clone, **call, use_cache=False)
    except _Reached as reached:
        hidden = reached.hidden
    else:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} puts features in place itself, and its layers are not run "
            "in order, so nothing can leave before them. Run it without patch()."
        )
    media = {name for name in arguments if feature_modality(name) is not None} | {ENCODED}
    rest = {name: None if name in media else value for name, value in arguments.items()}
    return {**rest, "input_ids": None, "inputs_embeds": hidden}
