"""Layers without attention: linear attention, short convolutions, and MLPs or experts alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokencomp.engine.kinds.base import LayerKind

if TYPE_CHECKING:
    from tokencomp.engine.stage.segments import Segment


@dataclass(frozen=True)
class Mixing(LayerKind):
    """No layer that keeps rows: a token that leaves is not in the sequence at all."""

    attends = False


@dataclass(frozen=True)
class State(Mixing):
    """The layer keeps a state of constant size, and takes the 2-D mask of padding."""

    def mask(self, source: Any, segment: Segment, x: Tensor, text: Tensor | None) -> Any:
        """False at padding, (B, n), or None where there is none."""
        return None if source.new is None else source.new.to(x.device)
