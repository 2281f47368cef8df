"""One decoder call under compression: its stages, and what its layers get and leave behind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.engine.cache.frames import compared_frames
from tokencomp.engine.layer_types.masks import MaskSource
from tokencomp.engine.layer_types.types import LayerTypes
from tokencomp.engine.rows.arguments import sequence_dim, table_parts
from tokencomp.engine.rows.compaction import Selection, compact, take
from tokencomp.engine.rows.layout import RowLayout
from tokencomp.engine.stage.segments import Segment, build_segments
from tokencomp.engine.stage.stage_input import StageInput
from tokencomp.engine.stage.stage_scores import StageScores, rater_weights
from tokencomp.engine.stage.survivors import surviving_rows
from tokencomp.engine.tower.flops import TowerCost
from tokencomp.plan.budgets import Place, packed_places
from tokencomp.plan.plan import Plan
from tokencomp.plan.stages import Stage
from tokencomp.tokens.signals import FRAMES, NORM, Attention, Signal
from tokencomp.tokens.spans import VisualSpan


class ForwardPass:
    """State of one decoder call.

    Attributes
    ----------
    compresses
        True for a prefill with visual tokens, False for later tokens on a compressed cache.
    width
        Columns of the call in the caller's batch.
    layout
        Where tokens stand after the latest stage.
    places
        Per sample, per span: where it stands among the items of its prompt; None where the plan
        treats all items alike.
    merges
        Whether a stage merges what does not stay of an item of this call.
    tail
        Last columns that stand where the caller put them, whatever leaves.
    tower
        Signals of the vision tower: values of every span of every sample, see `TowerProbe`.
    survivors
        Where tokens stood once those had left that a stage in the vision tower has dropped.
    tower_costs
        Work of the calls of the vision tower for this prompt; empty if they are not known.
    rotary
        True positions (B, n) for decoders with one position per token.
    tables
        Rotary tables of the columns that the entry stage leaves, where it has computed them, by
        the layer type that they are for (None: all).
    scores
        Attention scores for stages that have not run yet; None where no reducer reads any.
    layer_types
        Kinds of the decoder layers, and their attention windows.
    by_column
        Whether windows are measured in columns of the uncompressed sequence, not in rows.
    prepared
        The mask that the body prepared for the uncompressed call, see `MaskSource`.
    chunk, earlier
        Columns per chunk of a chunked prefill (else None), and hidden states of chunks that have
        run.
    weighed
        Decoder layers whose attention has asked for the weights of rows.
    repeated
        By the first layer of a segment whose merged rows were cached repeatedly: the rows that it
        caches of every sample.
    cache
        The KV cache with which a prefill was called, or None.
    new
        Of later tokens: False at padding, (B, n); None if there is none.
    """

    def __init__(
        self,
        adapter: Adapter,
        plan: Plan,
        spans: list[list[VisualSpan]],
        layout: RowLayout,
        width: int,
    ) -> None:
        self.adapter, self.plan, self.layout = adapter, plan, layout
        self.width, self.spans, self.lengths = width, spans, layout.lengths
        self.prompts = [
            [(p.stop - p.start, [j for j, s in enumerate(row) if p.holds(s)]) for p in prompts]
            for prompts, row in zip(layout.prompts, layout.spans, strict=False)
        ]
        layers = len(adapter.layers)
        self.places: list[list[Place | None]] = [[None] * len(row) for row in spans]
        if plan.has_budget:
            pairs = zip(spans, self.prompts, strict=False)
            self.places = [list(packed_places(row, own)) for row, own in pairs]
        self.counts = [
            [plan.counts(s, layers, place) for s, place in zip(row, own, strict=True)]
            for row, own in zip(spans, self.places, strict=True)
        ]
        self.tail = min((width - row[-1].stop for row in spans if row), default=width)
        if layout.origin is not None:  # the caller's last columns may be padding
            self.tail = 0
        self.segments: list[Segment] = []
        self.rotary: Tensor | None = None
        self.tables: dict[str | None, Any] = {}
        self.chunk: int | None = None
        self.earlier: list[Tensor] = []
        self.tower: dict[Signal, list[list[Tensor]]] = {}
        self.tower_costs: list[TowerCost] = []
        self.compresses = True
        self.reduce_seconds = 0.0
        self.kept: list[RowLayout] = []
        self.survivors: RowLayout | None = None
        scored = any(isinstance(signal, Attention) for signal in plan.needs)
        self.scores = StageScores(adapter.layers) if scored else None
        self.merges = plan.may_merge and any(
            plan.merging(*item)
            for rows in zip(spans, self.counts, self.places, strict=True)
            for item in zip(*rows, strict=True)
        )
        self.layer_types = LayerTypes.of(adapter.decoder, served=True)
        self.by_column = True
        self.prepared: Any = None
        self.new: Tensor | None = None
        self.weighed: set[int] = set()
        self.repeated: dict[int, list[int]] = {}
        self.cache: Any = None

    @classmethod
    def continuation(
        cls, adapter: Adapter, layers: list[Any], new: Tensor | None, width: int
    ) -> ForwardPass:
        """The forward pass of later tokens on a compressed cache."""
        forward = cls(adapter, Plan(), [], RowLayout(width, [], []), width)
        forward.compresses, forward.new = False, new
        forward.segments = build_segments(forward.plan, len(layers), layers, None, width)
        return forward

    def segment_of(self, layer: int) -> Segment:
        """The segment that decoder layer `layer` belongs to."""
        return next(s for s in self.segments if s.first <= layer < s.stop)

    def weights(self, segment: Segment) -> Tensor | None:
        """Tokens that the first rows of `segment` weigh as much as, (B, m); None: one each.

        Rows of reducers that merge by themselves weigh as much as others.
        """
        return segment.all_sizes() if self.merges else None

    # -- entry ----------------------------------------------------------------------------------

    def entry(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Apply the entry stage to x (B, L, d) and positions (…, B, L).

        Returns
        -------
        x, positions
            With n columns.
        index : Tensor of int64, shape (B, n), or None
            Column of the caller's batch that each column was; None if every column stays in place.
        """
        origin = self.layout.origin
        if origin is not None:  # not left-padded: align the real columns first
            self.layout = self.layout.to(x.device)
            valid = self.layout.valid(x.device)
            tensors = [x, positions.to(x.device)]
            x, positions = take(tensors, origin.to(x.device), [1, -1], valid)
        if self.plan.tower is not None:  # before anything scores what is not there
            with self.timed():
                selection = surviving_rows(x, self.layout, self.plan)
                x, positions = self._compact(selection, [x, positions], [1, -1])
                self.survivors = self.layout
        if any(isinstance(s, Attention) and s.rows == "raters" for s in self.plan.needs):
            self.layout.raters = rater_weights(x, self.layout)
        stage = self.plan.entry
        if stage is not None:
            tables = None if self.scores is None else self._score(stage, self.scores, x, positions)
            parts = [] if tables is None else table_parts(tables)
            dims = [1, -1, *map(sequence_dim, parts)]
            with self.timed():
                x, positions, *parts = self.reduce(stage, [x, positions, *parts], dims)
            if parts:
                modality = self.adapter.rotary_layer_type(layer=0)
                self.tables[modality] = tuple(parts) if isinstance(tables, tuple) else parts[0]
        self.segments[0].layout = self.layout
        return x, positions, self.layout.origin

    def _score(self, stage: Stage, scores: StageScores, x: Tensor, positions: Tensor) -> Any:
        """Score the tokens for the entry stage; gives the rotary tables that this takes."""
        tables = None
        for signal in stage.needs:
            if isinstance(signal, Attention) and signal.modalities & self.layout.modalities:
                if tables is None:
                    tables = self.adapter.rotary_tables(x, positions, layer=0)
                ids = None if self.adapter.mrope else positions
                with self.timed():
                    scores.of_input(0, x, tables, ids, signal, self.layout, self.cache)
        return tables

    def reduce(self, stage: Stage, tensors: list[Tensor], dims: list[int]) -> list[Tensor]:
        """Apply a stage: the first of `tensors` is x (B, n, d), the others follow its columns."""
        from tokencomp.kernels.dispatch import no_autocast

        x = tensors[0]
        with no_autocast(x):
            if stage.layer:  # layers may lie on several devices
                self.layout = self.layout.to(x.device)
            scores = texts = norm = frames = None
            if self.scores is not None:
                scores, texts = self.scores.pop(stage.layer, x.device)
            needs = stage.needs
            if NORM in needs:
                norm = self.adapter.final_norm
            if FRAMES in needs:
                frames = compared_frames(x, self.layout, self.cache)
            before = StageInput(x, self.layout, scores, self.tower, texts, norm, frames)
            order = self.plan.stages.index(stage)
            selection = before.selection(stage, order, self.counts, self.places)
            tensors = self._compact(selection, tensors, dims)
            self.kept.append(self.layout)
        return tensors

    def _compact(
        self, selection: Selection, tensors: list[Tensor], dims: list[int]
    ) -> list[Tensor]:
        """Put the layout after `selection` in force, and take its columns of all tensors."""
        device, before = tensors[0].device, self.layout
        self.layout, index, place = compact(before, selection, device)
        if self.scores is not None:
            self.scores.follow(before, self.layout, index, device)
        tensors = [t.to(device) for t in tensors]
        tensors = take(tensors, index, dims, self.layout.valid(device))
        merged = None if selection.reduction is None else selection.reduction.merged
        if merged is not None and place is not None:  # in place on the gathered rows
            tensors[0].flatten(0, 1).index_copy_(0, place, merged.to(tensors[0]))
        return tensors

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time that the block takes as that of the stages."""
        started = time.perf_counter()
        yield
        self.reduce_seconds += time.perf_counter() - started

    def mask_source(self, new: Tensor | None, cache: Any) -> MaskSource:
        """What the masks of this call are built from; `new` is False at padding, (B, n)."""
        layers = list(getattr(cache, "layers", None) or ())
        config, layer_types, own = self.adapter.text_config, self.layer_types, self.prepared
        return MaskSource(config, layer_types, layers, new, own, self.by_column, self.starts())

    def starts(self) -> Tensor | None:
        """First real column of every sample in the whole sequence, int64 (B,).

        None: unknown, or no window is counted from there.
        """
        if not self.layer_types.count_from_start:
            return None
        first = self.segments[0]
        if first.starts is not None or not self.compresses:
            return first.starts
        if first.physical:
            past = first.past
            return None if past is None else (past.cumsum(1) == 0).sum(1)
        origin, pads = self.layout.origin, [self.layout.width - n for n in self.layout.lengths]
        if origin is None:
            return torch.tensor(pads)
        return origin.cpu().gather(1, torch.tensor(pads)[:, None])[:, 0]
