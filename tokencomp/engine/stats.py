"""Exact counts of the last compressed call: tokens per layer, FLOPs, KV bytes."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tokencomp.engine.call import Call
from tokencomp.engine.layer_types import FULL, LAYER_TYPES
from tokencomp.engine.rowmap import RowMap
from tokencomp.engine.tower.rows import TowerCost
from tokencomp.engine.weights import extra_dims
from tokencomp.errors import OptionError, RatioWarning
from tokencomp.plan.counts import Place
from tokencomp.plan.plan import Plan
from tokencomp.reducers.base import counts_itself
from tokencomp.tokens.tokens import VisualSpan
from tokencomp.torchlib import compat

OFF = (
    "prompts are not counted where nothing is compressed; "
    "tokencomp.inputs.prompts.prompt_lengths(model, inputs) counts their tokens"
)


@dataclass(repr=False)
class Stats:
    """Counts of one prefill, most of which are computed on access.

    False where no prefill was counted: before the first, after a prompt without media, and at ratio
    0. Then all numbers are 0, and all lists empty.

    Attributes
    ----------
    spans
        Visual spans per sample, uncompressed.
    counts
        Per sample, per span: tokens left after each stage.
    lengths
        Real tokens per sample, uncompressed (text and visual).
    entering
        Per sample, per span: visual tokens that left the vision tower for the decoder.
    prompts
        Per sample, per prompt packed into it (usually one): its tokens, and numbers of its spans.
    past
        Logical tokens that were in the cache before, padding included.
    past_rows
        Rows of them that each decoder layer held.
    reduce_seconds
        Host time spent on the stages of this prefill, their scores included (on a GPU: launching,
        not waiting).
    prefill_chunk
        Columns of the compressed prompt that the decoder took at a time (`prefill_chunk_size`);
        None: all.
    tower_costs
        Work of the calls of the vision tower; empty without a stage in the tower, or if the tower
        ran in another thread or for other prompts in between.
    """

    spans: list[list[VisualSpan]]
    counts: list[list[list[int]]]
    lengths: list[int]
    prompts: list[list[tuple[int, list[int]]]]
    past: int = 0
    past_rows: list[int] = field(default_factory=list)
    reduce_seconds: float = 0.0
    prefill_chunk: int | None = None
    tower_costs: list[TowerCost] = field(default_factory=list, repr=False)
    _config: Any = None
    _itemsize: int = 2
    entering: list[list[int]] = field(default_factory=list)
    _plan: Plan = field(default_factory=Plan)
    _places: list[list[Place | None]] = field(default_factory=list)
    _kept: list[RowMap] = field(default_factory=list, repr=False)
    _survivors: RowMap | None = field(default=None, repr=False)
    _repeated: list[list[int]] = field(default_factory=list, repr=False)
    _off: bool = field(default=False, repr=False)

    @classmethod
    def of_call(cls, call: Call, layer: Any, repeated: dict[int, list[int]]) -> Stats:
        """Counts of a finished prefill; what follows from the config and the plan comes on access.

        `layer` and `repeated` are the results of `note_prompt`.
        """
        keys = layer.keys if layer is not None else None
        if keys is None:
            keys = next(call.adapter.decoder.parameters())
        segments = call.segments
        return cls(
            spans=call.spans,
            counts=call.counts,
            lengths=call.first_map.lengths,
            prompts=call.prompts,
            past=call.length - call.width,
            past_rows=[s.past.rows for s in segments for _ in range(s.first, s.stop)],
            reduce_seconds=call.stage_seconds + (call.scores.seconds if call.scores else 0.0),
            prefill_chunk=call.chunk,
            tower_costs=call.tower.costs,
            entering=call.entering,
            _config=call.adapter.text_config,
            _itemsize=keys.element_size(),
            _plan=call.plan,
            _places=call.places,
            _survivors=call.survivors,
            _repeated=_repeated(call, repeated) if repeated else [],
            _kept=call.kept,
        )

    @classmethod
    def empty(cls, config: Any, active: bool) -> Stats:
        """Counts of no prefill; `active` says whether prompts are compressed, and thus counted."""
        return cls([], [], [], [], _config=config, _off=not active)

    @functools.cached_property
    def shape(self) -> DecoderShape:
        return DecoderShape.from_config(self._config, self._itemsize)

    @property
    def stage_layers(self) -> list[int]:
        return [stage.layer for stage in self._plan.stages]

    @property
    def merged_from(self) -> int | None:
        """First decoder layer before which tokens are merged into others; None: never."""
        return min((layer for layer in self.merged if layer is not None), default=None)

    @functools.cached_property
    def merged(self) -> list[int | None]:
        """`merged_from` of every sample."""
        found = []
        for rows in zip(self.spans, self.counts, self._places, self.entering, strict=True):
            stages = (self._plan.merging(*item) for item in zip(*rows, strict=True))
            found.append(min((s.layer for s in stages if s is not None), default=None))
        return found

    @functools.cached_property
    def requested_ratio(self) -> float:
        """The ratio of the plan, before rounding to tokens and special tokens.

        For a budget: the ratio that it implies for these items.
        """
        plan, layers, before, removed = self._plan, self.shape.num_layers, 0, 0.0
        for row, places in zip(self.spans, self._places, strict=True):
            for span, place in zip(row, places, strict=True):
                before += span.visual
                removed += span.visual * plan.ratio(layers, span.modality, place)
        return removed / max(1, before)

    def __bool__(self) -> bool:
        return bool(self.spans)

    def __str__(self) -> str:
        """What was saved, e.g. "130 → 33 visual tokens, LLM work 36 %, cache 38 %"."""
        if not self:
            return OFF if self._off else "no prompt with media counted"
        layers = [sum(seen) for seen in zip(*self.tokens_after, strict=True)]
        left = sum(layers) / len(layers)
        mean = " in the mean layer" if len(set(layers)) > 1 else ""
        parts = [f"{sum(self.tokens_before)} → {left:.0f} visual tokens{mean}"]
        parts += ["the rest merged"] if self.merged_from is not None else []
        for name, before, after in (
            ("LLM work", self.flops_before, self.flops_after),
            ("cache", self.kv_bytes_before, self.kv_bytes_after),
            ("tower work", *self.tower_flops),
        ):
            parts += [f"{name} {100 * after / before:.0f} %"] if before else []
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"<tokencomp.Stats: {self}>"

    @property
    def tokens_before(self) -> list[int]:
        """Visual tokens per sample before compression."""
        return [sum(s.visual for s in row) for row in self.spans]

    @property
    def tokens_after(self) -> list[list[int]]:
        """Visual tokens per sample seen by each decoder layer."""
        return [self._left(*row) for row in zip(self.counts, self.entering, strict=True)]

    @property
    def ratio(self) -> float:
        """Achieved ratio: 1 - visual tokens seen / without compression, over layers and samples."""
        before = sum(self.tokens_before) * self.shape.num_layers
        after = sum(sum(seen) for seen in self.tokens_after)
        return 1.0 - after / before if before else 0.0

    def _left(self, counts: list[list[int]], entering: list[int]) -> list[int]:
        """Visual tokens of some spans that every decoder layer sees."""
        left, current, stages = [], sum(entering), self.stage_layers
        for layer in range(self.shape.num_layers):
            if layer in stages:
                current = sum(c[stages.index(layer)] for c in counts)
            left.append(current)
        return left

    def _lengths_after(self) -> list[list[int]]:
        """Per prompt: tokens that every decoder layer sees."""
        lengths = []
        rows = zip(self.spans, self.counts, self.entering, self.prompts, strict=True)
        for spans, counts, entering, prompts in rows:
            for length, chosen in prompts:
                text = length - sum(spans[j].visual for j in chosen)
                left = self._left([counts[j] for j in chosen], [entering[j] for j in chosen])
                lengths.append([text + n for n in left])
        return lengths

    @property
    def flops_before(self) -> int:
        """FLOPs of the decoder layers for this prefill without compression."""
        lengths = [length for row in self.prompts for length, _ in row]
        layers = range(self.shape.num_layers)
        return sum(self.shape.layer_flops(n, self.past, i) for n in lengths for i in layers)

    @property
    def flops_after(self) -> int:
        """FLOPs of the decoder layers with compression (without the work of the reducer)."""
        pasts, count, rows = self.past_rows, self.shape.layer_flops, self._lengths_after()
        first = self.shape.num_layers if self.merged_from is None else self.merged_from
        return sum(count(n, pasts[i], i, i >= first) for row in rows for i, n in enumerate(row))

    @property
    def cached(self) -> list[list[int]]:
        """Per sample: rows that every decoder layer caches, without padding.

        Rows of merged tokens count as often as they are repeated.
        """
        if self._repeated:
            return self._repeated
        rows = iter(self._lengths_after())
        samples = [[next(rows) for _ in prompts] for prompts in self.prompts]
        return [[sum(layer) for layer in zip(*sample, strict=True)] for sample in samples]

    @property
    def kv_bytes_before(self) -> int:
        """Bytes of keys and values this prefill would have cached (no padding)."""
        layers = range(self.shape.num_layers)
        return sum(self.shape.kv_bytes(n, i) for n in self.lengths for i in layers)

    @property
    def kv_bytes_after(self) -> int:
        """Bytes of keys and values it caches for real tokens, see `cached`."""
        return sum(self.shape.kv_bytes(n, i) for row in self.cached for i, n in enumerate(row))

    @property
    def tower_ratio(self) -> float:
        """Achieved tower ratio: 1 - patches seen / patches of the input, over blocks in use.

        0 without a stage in the tower, NaN if its calls are not known.
        """
        if self._survivors is None:
            return 0.0
        before, after = _sums(cost.patches for cost in self.tower_costs)
        return 1.0 - after / before if before else math.nan

    @property
    def tower_flops(self) -> tuple[int, int]:
        """FLOPs of the blocks of the vision tower without and with its stage; 0 if unknown."""
        return _sums(cost.tower_flops for cost in self.tower_costs)

    @property
    def projector_flops(self) -> tuple[int, int]:
        """FLOPs of the projector without and with the stage in the tower; 0 if unknown."""
        return _sums(cost.projector_flops for cost in self.tower_costs)

    def tower_kept(self, sample: int = 0) -> list[list[int]]:
        """Offsets inside each span of tokens that the tower keeps: `tower_kept(b)[span]`."""
        if self._survivors is None:
            return [list(range(span.length)) for span in self.spans[sample]]
        return _offsets(self._survivors, sample)

    def kept(self, sample: int = 0) -> list[list[list[int]]]:
        """Offsets inside each span of kept tokens, per decoder stage: `kept(b)[stage][span]`.

        Empty without such a stage, as with "delta" and no ratio, where `tower_kept` has them.
        """
        return [_offsets(rows, sample) for rows in self._kept]

    def pooling_mask(self, attention_mask: Tensor) -> Tensor:
        """The padding mask of a batch, False at dropped columns as well.

        Hidden states have full length, and a dropped column repeats the one before it. A mean over
        tokens, or an index of page vectors, must use only kept columns.

        Parameters
        ----------
        attention_mask : Tensor, shape (B, L)
            Mask of the batch that was counted last; not changed.

        Returns
        -------
        Tensor
            The same shape and dtype.

        Raises
        ------
        OptionError
            The mask is that of another batch, or no batch was counted.
        """
        if self._off:
            return attention_mask.clone()
        width = max((span.stop for row in self.spans for span in row), default=0)
        if len(self.spans) != len(attention_mask) or width > attention_mask.shape[1]:
            raise OptionError(
                f"pooling_mask({tuple(attention_mask.shape)}): the batch counted last has "
                f"{len(self.spans)} samples of at least {width} columns. Pass the attention mask "
                "of the last batch with media."
            )
        mask = attention_mask.clone()
        for b, spans in enumerate(self.spans):
            last = self.kept(b)[-1] if self._kept else self.tower_kept(b)
            for span, offsets in zip(spans, last, strict=True):
                gone = set(range(span.length)).difference(offsets)
                mask[b, [span.start + offset for offset in sorted(gone)]] = 0
        return mask

    def summary(self) -> dict[str, Any]:
        """The numbers as plain types, ready for JSON."""
        return {
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "ratio": self.ratio,
            "requested_ratio": self.requested_ratio,
            **({} if self.merged_from is None else {"merged_from": self.merged_from}),
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            "kv_bytes_before": self.kv_bytes_before,
            "kv_bytes_after": self.kv_bytes_after,
            **self._tower_summary(),
        }

    def _tower_summary(self) -> dict[str, Any]:
        """What a stage in the vision tower saved; empty without one."""
        if self._survivors is None:
            return {}
        tower, projector = self.tower_flops, self.projector_flops
        return {
            "tower_ratio": self.tower_ratio,
            "tower_kept": self.entering,
            "tower_flops_before": tower[0],
            "tower_flops_after": tower[1],
            "projector_flops_before": projector[0],
            "projector_flops_after": projector[1],
        }


def _offsets(rows: RowMap, sample: int) -> list[list[int]]:
    pairs = [(kept, rows.offsets_of(sample, kept)) for kept in rows.spans[sample]]
    return [list(range(kept.count)) if o is None else o.tolist() for kept, o in pairs]


def _repeated(call: Call, repeated: dict[int, list[int]]) -> list[list[int]]:
    """Per sample, the rows that every decoder layer caches."""
    parts = [(repeated.get(s.first, s.new.lengths), s) for s in call.segments]
    layers = [lengths for lengths, s in parts for _ in range(s.first, s.stop)]
    return [list(sample) for sample in zip(*layers, strict=True)]


def _sums(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    firsts, seconds = zip((0, 0), *pairs, strict=True)
    return sum(firsts), sum(seconds)


class RatioCheck:
    """Warns, once per plan, of a prompt that misses its ratio by more than rounding."""

    def __init__(self) -> None:
        self._warned: set[str] = set()  # names of plans

    def look(self, stats: Stats, plan: Plan) -> None:
        """Warn if a prompt is the first to miss the ratio of its plan.

        Tolerance: one token per span, or a twentieth of the tokens that should be kept. Plans whose
        reducers all choose their keep counts promise no ratio.
        """
        if plan.tower is not None and plan.tower.decides:
            return  # its ratio is a lower bound
        spans, itself = sum(map(len, stats.spans)), [counts_itself(s.reducer) for s in plan.stages]
        special = any(span.special for row in stats.spans for span in row)
        if not special and plan.tower is None and not any(itself):
            return  # only rounding
        planned, achieved, before = _ratios(stats, plan)
        if not before or abs(planned - achieved) <= max(0.05 * (1 - planned), spans / before):
            return
        stages = [
            (s.layer, s.fraction, s.by_modality, s.budget, s.reducer.name) for s in plan.stages
        ]
        name = f"{stages}{plan.tower and (plan.tower.fraction, plan.tower.budget)}"
        if name in self._warned or (itself and all(itself)):
            return
        self._warned.add(name)
        warnings.warn(
            f"a prompt was planned for ratio {planned:.5g} and reached {achieved:.5g}: "
            f"{_reason(stats, itself)}. The handle's stats have the counts of every prompt. This "
            "warning appears once per plan.",
            RatioWarning,
            stacklevel=3,
        )


def _ratios(stats: Stats, plan: Plan) -> tuple[float, float, int]:
    """Planned and achieved ratio of a prompt, and its visual tokens."""
    layers = [*(s.layer for s in plan.stages), len(stats.past_rows)]
    spread = [b - a for a, b in itertools.pairwise(layers)]  # layers of every stage
    # Layers before the first stage see what enters the decoder.
    before = planned = seen = 0.0
    rows = zip(stats.spans, stats.counts, stats._places, stats.entering, strict=True)
    for row in rows:
        for span, kept, place, entering in zip(*row, strict=True):
            fraction = plan.tower.fraction_of(place) if plan.tower else 1.0
            before += span.visual
            planned += span.visual * fraction * layers[0]
            seen += entering * layers[0]
            for stage, count, n in zip(plan.stages, kept, spread, strict=True):
                planned += span.visual * stage.fraction_of(span.modality, place) * n
                seen += count * n
    total = max(1.0, before * layers[-1])
    return 1 - planned / total, 1 - seen / total, int(before)


def _reason(stats: Stats, itself: list[bool]) -> str:
    """Why a ratio was missed; `itself` marks stages that choose their keep count."""
    every = [span for row in stats.spans for span in row]
    most = max(every, key=lambda span: len(span.special) / max(1, span.visual))
    if not itself:
        return "the vision tower keeps a cell or more of every frame, and all special tokens"
    if most.special and stats.ratio < stats.requested_ratio and not any(itself):
        return (
            f"special tokens, such as line breaks, are always kept, {len(most.special)} of "
            f"{most.visual} in one {most.modality}"
        )
    return "a reducer of this plan chooses the number of tokens itself"


# -- FLOPs and KV bytes of decoder layers, from shapes alone -------------------------------------


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-like decoder (gated MLP, grouped-query attention).

    Attributes
    ----------
    reach
        Tokens that a query sees at most; None: all; 0: there is no attention, so that the cost is
        linear.
    stored
        Numbers that are cached for a token, its keys and values together: none for layers with a
        state of constant size, or with the keys of another layer.
    per_layer
        Shape of every layer, where layers differ; empty where all are alike.
    """

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2
    reach: int | None = None
    stored: int | None = None
    per_layer: tuple[DecoderShape, ...] = ()

    @classmethod
    def from_config(cls, config: Any, itemsize: int = 2) -> DecoderShape:
        """Sizes of a transformers text config."""
        count = config.num_hidden_layers
        types = list(getattr(config, "layer_types", None) or ())[:count]
        per_layer = compat.layer_configs(config)
        first = cls._of_layer(per_layer[0], count, itemsize)
        if len(set(types)) < 2 and not (types and LAYER_TYPES.get(types[0], FULL).window_field):
            return first
        shared = compat.kv_sharing_modes(config) or ["store"] * count
        shapes = []
        for name, mode, layer in zip(types, shared, per_layer, strict=False):
            shape = cls._of_layer(layer, 1, itemsize, "swa_" if name == "hybrid_sliding" else "")
            layer_type = LAYER_TYPES.get(name, FULL)
            reach = getattr(layer, layer_type.window_field or "", None) if layer_type.attends else 0
            stored = shape.stored if layer_type.attends and not str(mode).startswith("reuse") else 0
            shapes.append(replace(shape, reach=reach, stored=stored))
        return replace(first, per_layer=tuple(shapes))

    @classmethod
    def _of_layer(cls, config: Any, count: int, itemsize: int, prefix: str = "") -> DecoderShape:
        """`prefix` is that of the fields that give the heads of such layers."""
        heads = getattr(config, f"{prefix}num_attention_heads")
        kv_heads = getattr(config, f"{prefix}num_key_value_heads", None) or heads
        head_dim = getattr(config, f"{prefix}head_dim", None) or config.hidden_size // heads
        intermediate = getattr(config, "intermediate_size", None)
        if intermediate is None:  # experts alone
            experts = config.num_experts_per_tok * config.moe_intermediate_size
            intermediate = experts + (getattr(config, "shared_expert_intermediate_size", 0) or 0)
        if isinstance(intermediate, list | tuple):
            intermediate = sum(intermediate) // len(intermediate)
        sizes = (count, config.hidden_size, intermediate, heads, kv_heads, head_dim, itemsize)
        return cls(*sizes, stored=2 * kv_heads * head_dim)

    def layer(self, number: int | None) -> DecoderShape:
        """The shape of one layer; None: of a layer like the first with full attention."""
        return self.per_layer[number] if self.per_layer and number is not None else self

    @property
    def linear_flops_per_token(self) -> int:
        """2 × weights of q, k, v, o and the three MLP matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (attention + 3 * self.hidden * self.intermediate)

    def layer_flops(
        self, tokens: int, past: int = 0, layer: int | None = None, weighted: bool = False
    ) -> int:
        """FLOPs of one layer for `tokens` new tokens after `past` cached ones.

        Causal attention counts the visible half: 4 · heads · head_dim per (query, key) pair. The
        mixer of a linear layer counts as much as the projections of attention. `weighted` rows
        take a few more dimensions per head to attention (`merge=True`).
        """
        shape = self.layer(layer)
        pairs, reach = tokens * past + tokens * (tokens + 1) // 2, shape.reach
        if reach is not None:  # the first queries see fewer than the window holds
            growing = min(max(reach - past, 0), tokens)
            pairs = growing * past + growing * (growing + 1) // 2 + (tokens - growing) * reach
        dim = shape.head_dim + (extra_dims(shape.head_dim) if weighted else 0)
        attention = 4 * shape.heads * dim * pairs
        return tokens * shape.linear_flops_per_token + attention

    def kv_bytes(self, tokens: int, layer: int | None = None) -> int:
        """Bytes of keys and values that a layer caches for a prompt of `tokens` tokens."""
        shape = self.layer(layer)
        rows = tokens if shape.reach is None else min(tokens, max(shape.reach - 1, 0))
        stored = 2 * shape.kv_heads * shape.head_dim if shape.stored is None else shape.stored
        return rows * stored * shape.itemsize
