"""The stage in a vision tower of vLLM: the tower runs on the kept cells.

Towers of the Qwen families take the patches of all media as one sequence; positions, bounds of
sequences and window order come from `prepare_encoder_metadata`, and `forward` accepts them as an
argument. So fewer patches and matching metadata suffice: no block is hooked, and a compiled tower
remains compiled. The cells are chosen as by `tokencomp.patch(tower_ratio=...)`, from the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.towers.base import Cells, TowerCall
from tokencomp.adapters.towers.packed import PackedTower
from tokencomp.engine.tower.rows import PackedRows
from tokencomp.engine.tower.stage import chosen_cells
from tokencomp.errors import TokenCompError
from tokencomp.reducers.uniform import Uniform
from tokencomp.serving.item_plan import ItemPlan
from tokencomp.torchlib.replace import MethodReplacement

PER_ROW = ("rotary_pos_emb_cos", "rotary_pos_emb_sin", "pos_embeds")
BOUNDS = ("cu_seqlens", "cu_window_seqlens")

Report = Callable[[ItemPlan, TokenCompError], None]


class EngineTower:
    """A vision tower of vLLM that sees only kept cells inside `encode`; `report` gets failures."""

    def __init__(self, module: Any, report: Report) -> None:
        self.module, self.report = module, report
        self.layout = PackedTower(module, module.patch_embed.patch_size)
        self._plans: Sequence[ItemPlan] = ()
        self._kept: Tensor | None = None
        MethodReplacement(module, "forward", self._forward)

    def encode(
        self, embed: Callable[[], Any], plans: Sequence[ItemPlan]
    ) -> tuple[Any, list[Tensor]]:
        """Return what `embed` returns, for items whose plans have the same tower stage.

        These are rows (full, d) per item, NaN where the tower has dropped the cell; and the
        computed rows (entering,) of every item, ascending.
        """
        self._plans = plans
        try:
            features, kept = embed(), self._kept
        finally:
            self._plans, self._kept = (), None
        if kept is None:
            raise RuntimeError(f"{type(self.module).__name__} was not called to encode media.")
        present, first = [], 0
        for plan, cells in zip(plans, kept.split([p.entering for p in plans]), strict=True):
            present.append(cells - first)
            first += plan.full
        return features, present

    def _forward(
        self, original: Callable[..., Tensor], x: Tensor, grid_thw: Any, **kwargs: Any
    ) -> Tensor:
        """Rows of all cells (cells, d), NaN where the stage has dropped the cell."""
        tower = self.module
        plan = self._plans[0] if self._plans else None
        if plan is None or plan.tower_stage is None:
            return original(x, grid_thw, **kwargs)
        grids = grid_thw.tolist() if isinstance(grid_thw, Tensor) else list(grid_thw)
        x = x.to(tower.device)
        pixels = torch.nan_to_num(tower.input_norm(x, tower.dtype))
        call = TowerCall(pixels, torch.as_tensor(grids), plan.modality)
        cells = self.layout.cells(call, plan.tower_stage)
        if plan.cells is None:
            kept = kept_cells(cells, plan, self.report)
        else:  # listed by the plans, over all of their items
            first, listed = 0, list[int]()
            for each in self._plans:
                listed += [first + cell for cell in each.cells or ()]
                first += each.full
            kept = torch.tensor(listed, device=pixels.device)
        metadata = shorter(tower.prepare_encoder_metadata(grids), cells, kept)
        rows = original(x[cells.members[kept].flatten()], grids, encoder_metadata=metadata)
        self._kept = kept
        full = rows.new_full((len(cells.members), rows.shape[-1]), torch.nan)
        return full.index_copy(0, kept, rows)


def kept_cells(cells: Cells, plan: ItemPlan, report: Report) -> Tensor:
    """Cells that the tower stage of a plan keeps, int64, ascending; on errors evenly spaced.

    An exception would end the engine and all requests.
    """
    stage: Any = plan.tower_stage
    try:
        kept = chosen_cells(cells, stage)
    except TokenCompError as error:
        report(plan, error)
        kept = chosen_cells(cells, replace(stage, reducer=Uniform()))
    return kept.sort().values


def shorter(metadata: dict[str, Any], cells: Cells, kept: Tensor) -> dict[str, Any]:
    """Metadata of a tower for the cells `kept` (n,), ascending.

    The lengths of the longest sequence do not change: they are upper bounds.
    """
    order = metadata.get("window_index")
    rows = PackedRows.of(replace(cells, order=order), kept)
    result = dict(metadata)
    result.update({name: metadata[name][rows.index] for name in PER_ROW if name in metadata})
    result.update({n: rows.bounds(metadata[n])[0] for n in BOUNDS if n in metadata})
    if order is not None:
        unit = cells.members.shape[1]
        result["window_index"] = torch.searchsorted(kept, order[rows.index[::unit] // unit])
        result["reverse_indices"] = result["window_index"].argsort()
    return result
