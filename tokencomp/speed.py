"""The plan of a speedup: FLOPs of a model's tower, projector and decoder for one item."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.towers.base import Tower
from tokencomp.adapters.towers.dense import DenseTower
from tokencomp.adapters.towers.packed import PackedTower
from tokencomp.engine.stats import LayerShape, layer_shapes
from tokencomp.engine.tower.rows import TowerCost
from tokencomp.errors import OptionError, RatioError, UnsupportedModelError
from tokencomp.method import Method
from tokencomp.plan.plan import Plan, Stage, TowerStage
from tokencomp.plan.speed import PATHS, Goal, Point, largest, solve

USUAL = 1024
"""Cells of the picture by which `patch` judges whether a speedup is within reach."""


@dataclass(frozen=True, eq=False)
class ModelWork:
    """FLOPs of one item in a model; a multiplication and an addition are two.

    The text around it is not counted, so that the setting of an item does not depend on it. Layers
    of the decoder are those of `LayerShape`, blocks of the tower those of `TowerCost`.
    """

    layers: tuple[LayerShape, ...]
    tower: TowerCost
    blocks: int  # that are in use
    windowed: int  # of them with attention inside of windows
    window: int  # patches of a window
    patches: float  # of a cell

    @classmethod
    def of(cls, adapter: Adapter, layout: Tower) -> ModelWork:
        if isinstance(layout, DenseTower):
            table = layout.tables["image"]
            patches = float((table >= 0).sum()) / len(table)
        elif isinstance(layout, PackedTower):
            patches = float(layout.unit)
        else:
            raise OptionError(
                f"speedup: the work of the vision tower of {adapter.family} is not known. Give a "
                "ratio and a tower ratio."
            )
        blocks, windowed, window = len(layout.blocks), 0, 0
        if (full := getattr(layout.module, "fullatt_block_indexes", None)) is not None:
            windowed = blocks - len(full)
            window = (layout.module.window_size // layout.module.patch_size) ** 2
        layers = tuple(layer_shapes(adapter.text_config))
        return cls(layers, TowerCost.of(layout), blocks, windowed, window, patches)

    def flops(self, modality: str, cells: int, frames: int, point: Point) -> float:
        """From pixels to the end of the decoder, at one point of a path."""
        tokens = round(cells * (1.0 - point.ratio))
        decoder = float(sum(layer.flops(tokens) for layer in self.layers))
        kept = cells * (1.0 - point.tower)
        rows = kept * self.patches
        # Attention inside of every frame, or of every window: all pairs of its rows.
        frame = rows / frames
        window = min(frame, self.window * (1.0 - point.tower))
        pairs = rows * ((self.blocks - self.windowed) * frame + self.windowed * window)
        unused = 0 if point.tower else self.tower.unused
        linear = (self.blocks + unused) * self.tower.row * rows
        return decoder + linear + 4 * self.tower.width * pairs + self.tower.token * kept


def fast_plan(spec: Method, adapter: Adapter) -> Plan:
    """The stages of a speedup in one model.

    A packed tower and the decoder get a `Goal`, which is solved for every item. A dense tower keeps
    one fraction of every picture, so its plan has the fractions of one picture.

    Raises
    ------
    RatioError
        No setting of the path reaches the speedup.
    OptionError
        A reducer that acts between layers, or whose pixels decide what it keeps; a vision tower
        whose work is not known.
    UnsupportedModelError
        A vision tower that can drop nothing.
    """
    assert spec.speedup is not None
    try:
        layout = adapter.tower_layout()
        layout.fit(TowerStage(0, 0.5, spec.built_tower_reducer), adapter.family)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"speedup={spec.speedup:g}: the vision tower of {adapter.family} can drop nothing, so "
            "that most of the time up to the first token may stay. ratio=0.75 removes work of the "
            f"decoder alone. ({error})"
        ) from error
    work, dense = ModelWork.of(adapter, layout), isinstance(layout, DenseTower)
    cells = len(layout.tables["image"]) if isinstance(layout, DenseTower) else USUAL
    most = min(largest(work, modality, cells, 1) for modality in PATHS)
    if spec.speedup > most:
        raise RatioError(
            f"speedup={spec.speedup:g}: at most {math.floor(10 * most) / 10:g} is possible for a "
            f"picture of {cells:,} tokens in {adapter.family}. Give a smaller speedup, or smaller "
            "pictures (tokencomp.limit_image_tokens)."
        )
    layers, reducer = len(adapter.layers), spec.built_reducer
    if dense:
        point = solve(work, spec.speedup, "image", cells, 1)
        static = replace(spec, speedup=None, ratio=point.ratio, tower_ratio=point.tower)
        return static.stages(layers, adapter.first_layer_stage)
    stages = [s for ratio in (0.3, 0.6, 0.9) for s in reducer.plan(ratio, layers).stages]
    if any(s.layer for s in stages) or spec.repeats is not None:
        raise OptionError(
            f"speedup={spec.speedup:g} with reducer={reducer.name!r}: a speedup sets what the "
            "vision tower keeps, and what enters the decoder. Use a reducer that acts at entry, "
            "such as 'auto', 'condiv' or 'divprune', or give a ratio."
        )
    goal = Goal(speedup=spec.speedup, work=work)
    tower = TowerStage(0, 1.0, spec.built_tower_reducer, budget=replace(goal, of_tower=True))
    plan = Plan((Stage(0, 1.0, reducer, budget=goal),), tower)
    on = spec.stage_options
    return plan.with_options(**on) if on else plan
