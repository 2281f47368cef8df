"""Layers that attend to the rows which an indexer chooses (DeepSeek sparse attention)."""

from __future__ import annotations

from dataclasses import dataclass

from tokencomp.engine.kinds.base import LayerKind


@dataclass(frozen=True)
class Indexed(LayerKind):
    """The indexer adds its choice to the mask, so there has to be one."""

    skips_masks = False
    masks_single_tokens = True
