"""Vision towers that take the patches of all media as one sequence: the Qwen families."""

from __future__ import annotations

from typing import Any

import torch

from tokencomp.adapters.towers.base import Cells, Tower, TowerCall
from tokencomp.plan.plan import TowerStage

CHANNELS = 3  # red, green and blue; a patch has one or more frames of each


class PackedTower(Tower):
    """Towers of the Qwen families: a cell is `unit` adjacent patches.

    `window_order` computes `Cells.order` from the grids; None: cells are in order. `embedding` is
    the module that embeds every patch independently; None: there is none.
    """

    def __init__(
        self,
        module: Any,
        patch_size: int,
        window_order: Any = None,
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    ) -> None:
        mergers = [module.merger, *getattr(module, "deepstack_merger_list", [])]
        super().__init__(module, list(module.blocks), [], mergers, mergers)
        self.std = std
        self.unit, self.patch_size = module.spatial_merge_size**2, patch_size
        self.window_order = window_order
        self.embedding = getattr(module, "patch_embed", None)

    def cells(self, call: TowerCall, stage: TowerStage) -> Cells:
        assert call.grids is not None  # the tower itself needs them
        side = round(self.unit**0.5)
        grids = [(t, h // side, w // side) for t, h, w in call.grids.tolist()]
        members = torch.arange(len(call.pixels), device=call.pixels.device).view(-1, self.unit)
        order = None if self.window_order is None else self.window_order(call.grids)
        order = None if order is None else order.to(members.device)
        size = self.patch_size
        pixels = call.pixels.view(len(call.pixels), CHANNELS, -1, size, size)
        return Cells(pixels, members, [[grid] for grid in grids], call.modality, order=order)
