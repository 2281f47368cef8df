"""One call of the decoder: its prompt, and the segments of its layers.

The stages split the decoder into *segments*: layers of one segment see the same rows, and those of
the next segment see fewer. Every segment has two maps, of the rows of earlier calls (`past`) and of
this one (`new`):

    stages before layers 0 and 3       segment 0: layers 0 … 2     segment 1: layers 3 … 7
    rows of earlier calls (cache)      past: 40 rows of 60         past: 25 rows of 60
    rows of this call                  new: 50 rows of 100         new: 20 rows of 100
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.towers.base import TowerCall
from tokencomp.engine.cache import CompressedLayer, first_layer, memory_of, physical_length
from tokencomp.engine.layer_types import CHUNKED, LayerType, LayerTypes
from tokencomp.engine.memory import Entered, Memory
from tokencomp.engine.rowmap import RowMap, joined_columns, joined_mask, joined_weights
from tokencomp.errors import copy_error
from tokencomp.plan.counts import BudgetShare, packed_shares
from tokencomp.plan.plan import Plan, Stage
from tokencomp.tokens.signals import Signal
from tokencomp.tokens.tokens import Modality, VisualSpan
from tokencomp.torchlib.hooks import Hooked


@dataclass
class Segment:
    """Layers `first … stop - 1`, which see the same rows, of this call and of earlier ones."""

    first: int
    stop: int
    past: RowMap  # rows in their cache layers at the start of the call
    new: RowMap  # rows of this call before any stage, until the stage of the segment sets them
    stage: Stage | None = None  # the stage before layer `first`
    # Row of segment 0 for every new row, int64 (B, rows), by which arguments of the decoder are
    # gathered; None: the same rows.
    index: Tensor | None = None
    # By layer type: `attention_mask` and rotary tables. Empty in segment 0, where the decoder
    # computes them.
    masks: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    text_positions: Tensor | None = None  # `position_ids` of the layers
    lengths: dict[str, Any] = field(default_factory=dict)  # of packed prompts (`cu_seq_lens_*`)
    cached: Any = None  # first cache layer from `first` on that held rows at the start of the call
    # Whether attention counts a new row as often as `new.weights` says. Reducers that merge by
    # themselves count tokens there too, for later stages alone.
    merges: bool = False
    ready: bool = False  # whether layer `first` has been entered

    def columns(self, batch: int, device: torch.device) -> Tensor | None:
        """Column of every row, cached or new, (B, rows); None: row i is column i."""
        return joined_columns(self.past, self.new, batch, device)

    def mask(self, device: torch.device | None = None) -> Tensor | None:
        """False at padding rows, cached or new, (B, rows); None: all are real."""
        return joined_mask(self.past, self.new.mask(device), self.new.rows, device)

    def gap_within(self, rows: float) -> bool:
        """Whether a column may be missing among the last `rows` rows of any query."""
        # Rows that decode steps have written since the last map are consecutive.
        known = self.past.columns
        missing = known is not None and self.past.rows - known.shape[1] < rows
        return self.new.columns is not None or missing

    @property
    def counted(self) -> RowMap:
        """`new`, with weights only if attention counts them."""
        return self.new if self.merges else replace(self.new, weights=None)

    @property
    def weighted(self) -> bool:
        """Whether attention counts a row, cached or new, as several tokens."""
        return self.past.weights is not None or (self.merges and self.new.weights is not None)

    def weights(self, batch: int, device: torch.device) -> Tensor | None:
        """Tokens as which attention counts every row, cached or new, (B, rows); None: one each."""
        return joined_weights(self.past, self.counted, batch, device)

    def contiguous_positions(self, mask: Tensor | None, x: Tensor) -> Tensor:
        """Positions (B, n) that count real rows; x is (B, n, d)."""
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        # Two real cached rows and mask 0 1 1: counts -1 0 1, then 1 2 3; nothing reads that of
        # padding.
        counts, before = mask.long().cumsum(1) - 1, self.past.mask(x.device)
        counts += self.past.rows if before is None else before.sum(1, keepdim=True)
        return counts.clamp(min=0)


def build_segments(
    plan: Plan, total: int, layers: Sequence[Any], mask: Tensor | None, new: RowMap
) -> list[Segment]:
    """Split a decoder of `total` layers at the stages of the plan and of earlier calls.

    For later tokens `total` counts cache layers. Cache `layers` that hold other rows than the layer
    before say so (`starts_segment`), so that later tokens need no plan; the map of a compressed
    layer says which of its rows are real, and the caller's padding `mask` (B, past + L) is for the
    others. `new`: rows of the call before any stage.
    """
    # A segment starts at every stage of this plan, and of the plans of earlier calls.
    stages = {s.layer: s for s in plan.stages}
    earlier = {i for i, layer in enumerate(layers) if getattr(layer, "starts_segment", False)}
    starts = sorted({0, *stages, *earlier})
    segments = []
    for first, stop in zip(starts, [*starts[1:], total], strict=True):
        # A segment of linear layers only holds no rows: the next layer has as many.
        layer = first_layer(layers, first)
        if isinstance(layer, CompressedLayer):
            past = layer.current_map
        else:
            # Not compressed: row i is column i, and the caller knows its padding.
            past = RowMap(0 if layer is None else physical_length(layer))
            if mask is not None and past.rows:
                real = mask[:, : past.rows].bool()
                past.real = None if bool(real.all()) else real
        segments.append(Segment(first, stop, past, new, stages.get(first), cached=layer))
    return segments


@dataclass
class Noted:
    """What hooks outside the decoder store for its next call."""

    columns: int | None = None  # of the prompt of `generate`; None outside of it
    arguments: dict[str, Any] | None = None  # of `generate`, by name; None outside of it
    # From `generate`: modality of every feature in `inputs_embeds`, int (B, L), if the model takes
    # none.
    types: Tensor | None = None
    chunk: int | None = None  # from `generate`: chunk size of a chunked prefill; None: one pass
    labels: Tensor | None = None  # of a training call of the model
    logits: int = 0  # last columns whose logits the model returns; 0: all
    drafts: int = 0  # speculative tokens at the end of the call of the model
    grad: bool = False  # autograd was on when the model, the body or the decoder was last entered
    in_body: bool = False  # the body is running
    inputs: dict[str, Any] | None = None  # of the body, by name
    # Modality of the feature in every column of the body, int8 (B, L) on the CPU, see
    # `Adapter.modalities`.
    modalities: Tensor | None = None
    mask: Any = None  # `attention_mask` of the body
    # Modalities of the media that no stage of this call sees.
    apart: frozenset[Modality] = frozenset()
    # Calls of the vision tower within the call of the model, in order; None outside of a call.
    encoded: list[TowerCall] | None = None


@dataclass(eq=False)
class Call:
    """One decoder call on compressed rows: a prompt with media, or later tokens with its cache.

    It is complete when it is created. Later, `decoder.py` stores results of the passes that it
    runs, `choose.py` those of the stages, and `tower/` those of the vision tower.
    """

    adapter: Adapter
    plan: Plan
    spans: list[list[VisualSpan]]  # visual spans of every sample; none for later tokens
    width: int  # columns of the call in the caller's batch
    segments: list[Segment]  # of the decoder layers; at least one
    map: RowMap  # rows after the latest stage
    cache: Any = None
    by_column: bool = True  # whether windows are measured in columns; not for positions="compact"
    prepared: Any = None  # mask of the body for the uncompressed call, see `Masks`
    layer_types: LayerTypes = field(init=False)
    # Per sample, per packed prompt: its number of tokens, and numbers of its spans.
    prompts: list[list[tuple[int, list[int]]]] = field(default_factory=list)
    # Per sample, per span: visual tokens kept after each stage; visual tokens that reach the
    # decoder (`choose.enter` counts them where the pixels decide how many the tower keeps); its
    # share in a budget, if there is one.
    counts: list[list[list[int]]] = field(default_factory=list)
    entering: list[list[int]] = field(default_factory=list)
    shares: list[list[BudgetShare | None]] = field(default_factory=list)
    merges: bool = False  # whether a stage merges tokens in this call
    tail: int = 0  # number of last columns that no stage moves
    # Signals of the vision tower by sample and span, and the work of its calls.
    tower_signals: dict[Signal, list[list[Tensor]]] = field(default_factory=dict)
    tower_costs: list[Any] = field(default_factory=list)
    # Original positions (B, n) of the rows that the decoder runs on, if it has one position per
    # token.
    rotary: Tensor | None = None
    # Dtype of masks that add log(weight) to the attention logits (`later.py`); None: masks only
    # hide rows.
    numbers: torch.dtype | None = None
    chunk: int | None = None  # size of the chunks of a prefill; None: one pass
    earlier: list[Tensor] = field(default_factory=list)  # hidden states of the chunks that have run
    weighing: Any = None  # what attention has requested of the weights of merged tokens
    # What the cache showed of pictures before the call.
    memory: Memory = Memory()  # noqa: RUF009  # it never changes
    # Pictures of the call, for the memory after it; and by which signal the pictures of a modality
    # were compared.
    entered: list[Entered] = field(default_factory=list)
    compared: set[tuple[Signal, Modality]] = field(default_factory=set)
    scores: Any = None  # `StageScores` of later stages, if a reducer needs any
    kept: list[RowMap] = field(default_factory=list)  # the map after each stage
    survivors: RowMap | None = None  # the map after a stage in the vision tower
    stage_seconds: float = 0.0  # host time of the stages

    def __post_init__(self) -> None:
        self.layer_types = LayerTypes.of(self.adapter.decoder, served=True)
        self.modalities: set[Modality] = {span.modality for row in self.spans for span in row}
        self.segment_of = [s for s in self.segments for _ in range(s.first, s.stop)]
        past = self.segments[0].past
        self.length = past.rows + past.dropped + self.width  # of the sequence after this call
        self.first_layer, self.first_map = self.segments[0].cached, self.map
        if self.spans:
            self.memory = memory_of(self.cache)
            self._count()
        for segment in self.segments:
            segment.merges = self.merges

    def _count(self) -> None:
        """The pass `plan`: convert fractions of the stages to counts for every span."""
        plan, layers = self.plan, len(self.adapter.layers)
        self.shares = [[None] * len(sample) for sample in self.spans]
        self.prompts = [
            [(p.stop - p.start, [j for j, s in enumerate(kept) if p.holds(s)]) for p in prompts]
            for prompts, kept in zip(self.map.prompts, self.map.spans, strict=False)
        ]
        if plan.has_budget:
            pairs = zip(self.spans, self.prompts, strict=False)
            self.shares = [list(packed_shares(row, prompts)) for row, prompts in pairs]
        self.entering = [[plan.entering(span) for span in row] for row in self.spans]
        self.counts = [
            [plan.counts(span, layers, share) for span, share in zip(row, shares, strict=True)]
            for row, shares in zip(self.spans, self.shares, strict=True)
        ]
        # Whether some span loses tokens at a stage that merges.
        self.merges = plan.may_merge and any(
            plan.merging(*item)
            for rows in zip(self.spans, self.counts, self.shares, self.entering, strict=True)
            for item in zip(*rows, strict=True)
        )
        if self.map.columns is None:  # otherwise the caller's last columns may be padding
            self.tail = min((self.width - row[-1].stop for row in self.spans if row), default=0)

    @property
    def weighted(self) -> bool:
        """Whether attention counts a row of some layer, cached or new, as several tokens."""
        return any(segment.weighted for segment in self.segments)

    def key_weights(
        self, segment: Segment, layer_type: LayerType, keys: int, batch: int, device: torch.device
    ) -> Tensor:
        """Weights of the `keys` that attention of a layer gets, float32 (B, keys).

            rows of a segment, cached and new                       0  1  2  3  4  5
            keys of a layer with a window: the last                       2  3  4  5
            of a chunk of a prompt, whose last rows have not run    0  1  2  3
            of a static cache, with memory for later rows           0  1  2  3  4  5  ·  ·

        Layers that cut later turns lose rows between the prompt and the last ones. These weigh one,
        as do rows that are not written yet.
        """
        weights = segment.weights(batch, device)
        if weights is None:
            return torch.ones(batch, keys, device=device)
        # gone > 0: a window has lost the first rows, or later chunks have not run; < 0: a static
        # cache.
        gone = weights.shape[1] - keys
        if gone > 0 and self.chunk is None and layer_type.name in self.layer_types.sizes:
            return weights[:, gone:]
        return nn.functional.pad(weights, (0, -gone), value=1.0)

    def note_entering(self) -> None:
        """Count the tokens that the tower has kept; no stage keeps more of a span."""
        self.entering = [[k.count - len(k.span.text) for k in row] for row in self.map.spans]
        self.counts = [
            [[min(n, most) for n in counts] for counts, most in zip(*rows, strict=True)]
            for rows in zip(self.counts, self.entering, strict=True)
        ]

    def length_after(self) -> int:
        """Length of the sequence after this call in positions: columns, or rows if compact.

        For a static cache at least its static length: its used length is not read on the host.
        """
        rows = self.segments[0].past.rows + self.map.rows
        static = getattr(self.first_layer, "max_cache_len", 0)
        return max(self.length if self.by_column else rows, static)

    def memory_after(self, layer: Any) -> Memory:
        """What the cache shows after the call; `layer`: its first layer, with the rows of the call.

        A patch that a stage between layers drops is not shown.
        """
        memory = self.memory.forget(self.modalities, self.compared)
        if not self.entered:
            return memory
        row_map, device, batch = layer.row_map, layer.device, len(self.spans)
        past, last = self.segments[0].past, self.segments[-1].new
        # The row of every column of this call, -1 where none is held.
        columns = row_map.all_columns(batch, device)[:, past.rows :] - past.length
        real = row_map.mask(device)
        real = None if real is None else real[:, past.rows :]
        numbers = torch.arange(past.rows, row_map.rows, device=device)
        rows = by_column(numbers, columns, real, self.width)
        # The first layer holds rows that a stage between layers drops; the last segment has what is
        # left.
        if len(self.segments) > 1:
            columns, real = last.all_columns(batch, device), last.mask(device)
            rows = rows.masked_fill(by_column(columns, columns, real, self.width) < 0, -1)
        return memory.append(self.entered, rows, row_map.rows)

    def first_columns(self) -> Tensor | None:
        """First real column of every sample in the whole sequence, int64 (B,).

        None if it is unknown, or if no window counts from there.
        """
        if CHUNKED.name not in self.layer_types.sizes:
            return None
        past = self.segments[0].past
        if past.starts is not None or not self.spans:
            return past.starts
        # An earlier text turn without a compressed cache: as many padding columns as its mask
        # begins with.
        if past.rows:
            real = past.mask()
            return None if real is None else (real.cumsum(1) == 0).sum(1)
        return self.map.first_column()


def by_column(values: Tensor, columns: Tensor, real: Tensor | None, width: int) -> Tensor:
    """Values of rows, int64 (n,) or (B, n), by column (B, width); -1 where there is no row.

    `columns` (B, n) are those of the rows, and `real` (B, n) is False at padding rows.
    """
    # Padding rows write to the column `width`, which is cut off.
    if real is not None:
        columns = columns.masked_fill(~real, width)
    table = columns.new_full((len(columns), width + 1), -1)
    return table.scatter_(1, columns, values.expand_as(columns))[:, :width]


class ThreadState:
    """State of a patched model in one thread."""

    def __init__(self) -> None:
        self.noted = Noted()
        # The running decoder call, if its rows, masks or positions differ from the caller's.
        self.call: Call | None = None
        self.recomputed: Call | None = None  # its checkpointed layer runs in a backward pass
        self.tower: TowerCall | None = None  # until the output of the tower has full length again
        self.weighs = False  # whether attention is widened for a call of this thread
        self.disabled = 0  # depth of nested `Handle.disabled()` blocks


class RunningCalls(threading.local):
    """Thread-local state of a patched model: `state` differs in every thread.

    `state` is no class attribute, so that Dynamo reads and guards the object of the thread.
    """

    def __init__(self) -> None:
        self.state = ThreadState()


class CallHooks(Hooked):
    """Base of hooks that read the state of the running call."""

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        self.adapter, self.calls = adapter, calls

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise copy_error(type(self.adapter.model).__name__)

    def _has_call(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether a call with other rows, masks or positions than the caller's is running."""
        return self.calls.state.call is not None
