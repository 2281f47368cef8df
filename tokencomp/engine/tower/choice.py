"""Which cells of a vision tower stay: a reducer sees the patches of a call as one batch."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.towers.base import Cells
from tokencomp.plan.plan import Plan
from tokencomp.plan.reducer import reduced
from tokencomp.plan.stages import TowerStage
from tokencomp.tokens.spans import SpanBatch
from tokencomp.tokens.stacks import rows_of, starts_of


def check_tower_stage(plan: Plan, adapter: Adapter) -> Plan:
    """The plan with what its tower stage must know of the model.

    Refused are families that do not say which patches a visual token reads.
    """
    if plan.tower is None:
        return plan
    layout, stage = adapter.tower_layout(), plan.tower
    layout.check(stage, adapter.family)
    return Plan(plan.stages, replace(stage, frames_apart=layout.frames_apart))


@torch.no_grad()
def chosen_cells(
    cells: Cells, stage: TowerStage, values: Tensor, pixels: tuple[int, int, int] | None = None
) -> Tensor:
    """Numbers of the cells that stay, int64, shape (kept cells,), in no certain order.

    Parameters
    ----------
    values : Tensor, shape (patches, d)
        Pixels or hidden states of the patches, in the order of the tower's input.
    pixels
        (frames, height, width) of a patch, if the values are pixels.
    """
    from tokencomp.kernels.dispatch import no_autocast

    grids = list(itertools.chain.from_iterable(cells.parts))
    keeps = list(itertools.chain.from_iterable(map(stage.cells, cells.parts)))
    lengths = [math.prod(grid) for grid in grids]
    ends = starts_of(lengths)

    def cells_of(parts: list[int]) -> Tensor:
        return torch.from_numpy(rows_of(ends, parts)).to(values.device)

    # The reducer does not see parts of which all cells stay, or none.
    whole = [i for i, length in enumerate(lengths) if keeps[i] == length]
    some = [i for i, length in enumerate(lengths) if 0 < keeps[i] < length]
    chosen = [cells_of(whole)] if whole else []
    if some:
        rows = cells_of(some)
        with no_autocast(values):
            batch = SpanBatch(
                features=_cell_values(values, cells.members[rows], pixels is not None),
                lengths=[lengths[i] for i in some],
                grids=[grids[i] for i in some],
                modalities=[cells.modality for _ in some],
                fixed=[0 for _ in some],
                pixels=pixels,
            )
            reduction = reduced(stage.reducer, batch, [keeps[i] for i in some])
        chosen.append(rows[reduction.keep])
    return torch.cat(chosen)


def patch_values(cells: Cells, hidden: Tensor) -> Tensor:
    """Hidden states (patches, d) of a block's input, in the order of the tower's input."""
    if cells.pictures:
        per_picture = len(cells.pixels) // cells.pictures
        return hidden[:, hidden.shape[1] - per_picture :].flatten(0, 1)
    if cells.order is None:
        return hidden
    by_cell = hidden.view(len(cells.members), -1, hidden.shape[-1])
    return by_cell[cells.order.argsort()].flatten(0, 1)


def _cell_values(values: Tensor, members: Tensor, apart: bool) -> Tensor:
    """Values (patches, d) of cells, float32: those of all patches side by side, or their mean."""
    present = (members >= 0)[..., None]
    x = values[members.clamp(min=0)].float().masked_fill_(~present, 0)
    return x.flatten(1) if apart else x.sum(1) / present.sum(1)
