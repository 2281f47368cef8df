"""The plan of one media item of a prompt: its spans, and the keep count of each.

Spans are cut exactly as by the adapters of the Hugging Face path, so that both backends reduce the
same tokens with the same reducer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from tokencomp import __version__
from tokencomp.method import Method
from tokencomp.plan.counts import Budget, budget_shares
from tokencomp.plan.plan import Stage, TowerStage
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import make_reducer, options_of
from tokencomp.serving.spec import OPERATOR_OPTIONS
from tokencomp.tokens.tokens import Grid, ModelFacts, VisualSpan
from tokencomp.trained.cards import content_hash


def field_name(modality: str) -> str:
    return f"tokencomp_{modality}"


def config_facts(config: Any, folder: str) -> ModelFacts:
    """Facts without the fingerprint, as a front end has no weights."""
    text = config.get_text_config()
    return ModelFacts(False, config.model_type, text.num_hidden_layers, text.hidden_size, folder)


def cache_key(spec: Method, facts: ModelFacts | None = None) -> dict[str, Any]:
    """Cache key of an active spec: options, release, and content of files of trained weights."""
    bound = spec.built_reducer.bind(facts or ModelFacts(mrope=False))
    return {**spec.describe(), "version": __version__, "weights": _weights_of(bound)}


def _weights_of(bound: Reducer) -> str:
    """Hash of the trained weights, or ""."""
    options = options_of(bound).items()
    files = [v for k, v in options if v and k.rpartition(".")[2] in OPERATOR_OPTIONS]
    return " ".join(content_hash(Path(file)) for file in files)


def item_span(modality: Any, grid: Grid, special: Iterable[int] = ()) -> VisualSpan:
    """A span of an item: `grid` (t, h, w) after the projector, offsets of special tokens."""
    offsets = tuple(special)
    return VisualSpan(0, math.prod(grid) + len(offsets), grid, modality, offsets, item=0)


class ItemSize(NamedTuple):
    """Tokens of an item before and after the reduction, its positions (`ItemPlan.extent`), and
    whether dropped tokens are merged.
    """

    full: int
    kept: int
    extent: int
    merged: bool = False


@dataclass(frozen=True)
class ItemPlan:
    """What happens to one image or video; travels from the front end to the workers as JSON."""

    spans: tuple[VisualSpan, ...]
    keep: tuple[int, ...]  # tokens left of each
    reducer: str
    options: str = "{}"
    extent: int = 0  # positions of the uncompressed item, where kept tokens keep theirs
    # Fraction of the cells that the tower sees, a budget in its place, and the reducer; None: all.
    tower: tuple[float, int | None, str, str] | None = None
    weights: str = ""  # hash of trained weights, which workers read again when it changes
    fraction: float = 1.0  # of the item that the stage keeps, on which merge="auto" depends
    stage_options: str = "{}"  # those in force, as JSON
    cells: tuple[int, ...] | None = None  # ascending, that the tower sees; None: not from pixels

    @classmethod
    def make(
        cls,
        spans: list[VisualSpan],
        spec: Method,
        extent: int = 0,
        facts: ModelFacts | None = None,
        cells: Sequence[int] | None = None,
    ) -> ItemPlan:
        """Plan an item under an active spec; `facts` of the model find and check trained weights.

        `cells`: if the pixels decide, the cells of an item of one span that the tower sees. Raises
        `WeightsError` for weights that are missing, damaged, or of another model.
        """
        facts = replace(facts or ModelFacts(mrope=False), mrope=extent > 0)
        # A reducer that can be served has one stage, at entry, however many layers there are.
        plan = spec.stages(num_layers=1, first_layer_stage=1).bind(facts)
        # If a tower stage keeps no more than the ratio asks for, there is no entry stage.
        # Spans of an item (tiles) divide its budget.
        each = budget_shares(spans)
        counts = [
            plan.counts(span, 1, share) or [plan.entering(span)]
            for span, share in zip(spans, each, strict=True)
        ]
        bound = (spec.repeats.later if spec.repeats else spec.built_reducer).bind(facts)
        name, options = _described(bound)
        fraction, on, tower = 1.0, {}, None
        for stage in plan.stages:  # all spans of an item have the same fraction
            fraction, on = stage.fraction_of(spans[0].modality, each[0]), stage.stage_options
        if plan.tower is not None:
            tokens = plan.tower.budget.tokens if plan.tower.budget else None
            tower = (plan.tower.fraction, tokens, *_described(plan.tower.reducer))
        keep = tuple(count[-1] for count in counts)
        # Pixels decide what the tower sees; a ratio may keep fewer of it.
        if cells is not None:
            keep, cells = (min(*keep, len(cells)),), tuple(cells)
        return cls(
            tuple(spans), keep, name, options, extent, tower, _weights_of(bound), fraction,
            json.dumps(on, sort_keys=True), cells,
        )  # fmt: skip

    @property
    def modality(self) -> Any:
        return self.spans[0].modality

    @property
    def full(self) -> int:
        """Number of tokens of the uncompressed item."""
        return sum(s.length for s in self.spans)

    @property
    def kept(self) -> int:
        return sum(self.keep)

    @property
    def size(self) -> ItemSize:
        merged = self.merge and self.kept < self.entering
        return ItemSize(self.full, self.kept, self.extent, merged)

    @cached_property
    def stage(self) -> Stage:
        """The stage before the first decoder layer."""
        reducer = built(self.reducer, self.options, self.weights)
        return Stage(0, self.fraction, reducer, **json.loads(self.stage_options))

    @property
    def merge(self) -> bool:
        return self.stage.merges(self.modality, self.fraction)

    @cached_property
    def tower_stage(self) -> TowerStage | None:
        """The stage in the vision tower, if any; equal for items that one call may encode."""
        if self.tower is None:
            return None
        fraction, tokens, reducer, options = self.tower
        budget = None if tokens is None else Budget(tokens)
        return TowerStage(0, fraction, built(reducer, options), budget=budget)

    @property
    def entering(self) -> int:
        """Number of tokens that the vision tower keeps."""
        if self.cells is not None:
            return len(self.cells)
        stage = self.tower_stage
        return self.full if stage is None else sum(stage.cells([s.grid])[0] for s in self.spans)

    def to_tensor(self) -> Tensor:
        """The plan as bytes of JSON: a uint8 tensor that every transport carries unchanged."""
        return torch.frombuffer(bytearray(JSON.dump_json(self)), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, data: Tensor) -> ItemPlan:
        """Inverse of `to_tensor`."""
        return JSON.validate_json(bytes(data.tolist()))


JSON = TypeAdapter(ItemPlan)


def _described(reducer: Reducer) -> tuple[str, str]:
    return reducer.name, json.dumps(options_of(reducer), sort_keys=True)


@lru_cache(maxsize=256)
def built(name: str, options: str, weights: str = "") -> Reducer:
    """The reducer of that name with options as JSON; cached by the hash of its `weights`."""
    return make_reducer(name, **json.loads(options))
