"""Exact counts of the last compressed call: tokens per layer, FLOPs, KV bytes."""

from __future__ import annotations

import functools
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
from tokencomp.plan.counts import BudgetShare
from tokencomp.plan.plan import Plan
from tokencomp.plan.speed import Goal
from tokencomp.reducers.base import counts_itself
from tokencomp.tokens.tokens import VisualSpan
from tokencomp.torchlib import compat

OFF = (
    "prompts are not counted where nothing is compressed; "
    "tokencomp.inputs.prompts.prompt_lengths(model, inputs) counts their tokens"
)


@dataclass(repr=False)
class Stats:
    """Counts of one prefill; most are computed on access.

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
    _shares: list[list[BudgetShare | None]] = field(default_factory=list)
    _kept: list[RowMap] = field(default_factory=list, repr=False)
    _survivors: RowMap | None = field(default=None, repr=False)
    _caches: bool = True
    _off: bool = field(default=False, repr=False)

    @classmethod
    def of_call(cls, call: Call, layer: Any) -> Stats:
        """Counts of a finished prefill; what follows from the config and the plan comes on access.

        `layer` is the first layer of the cache with rows, or None.
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
            tower_costs=call.tower_costs,
            entering=call.entering,
            _config=call.adapter.text_config,
            _itemsize=keys.element_size(),
            _plan=call.plan,
            _shares=call.shares,
            _survivors=call.survivors,
            _caches=layer is not None,
            _kept=call.kept,
        )

    @classmethod
    def empty(cls, config: Any, active: bool) -> Stats:
        """Counts of no prefill; `active` says whether prompts are compressed, and thus counted."""
        return cls([], [], [], [], _config=config, _off=not active)

    @functools.cached_property
    def layers(self) -> list[LayerShape]:
        """Sizes of the decoder layers."""
        return layer_shapes(self._config, self._itemsize)

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
        for rows in zip(self.spans, self.counts, self._shares, self.entering, strict=True):
            stages = (self._plan.merging(*item) for item in zip(*rows, strict=True))
            found.append(min((s.layer for s in stages if s is not None), default=None))
        return found

    @functools.cached_property
    def requested_ratio(self) -> float:
        """The ratio of the plan, before rounding to tokens and special tokens.

        For a budget: the ratio that it implies for these items.
        """
        plan, layers, before, removed = self._plan, len(self.layers), 0, 0.0
        for row, shares in zip(self.spans, self._shares, strict=True):
            for span, share in zip(row, shares, strict=True):
                before += span.visual
                removed += span.visual * plan.ratio(layers, span.modality, share)
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
        parts = [f"{sum(self.tokens_before)} → {left:.0f} visual tokens{mean}{self._bound}"]
        parts += ["the rest merged"] if self.merged_from is not None else []
        cache = (self.kv_bytes_before, self.kv_bytes_after) if self._caches else (0, 0)
        for name, before, after in (
            ("LLM work", self.flops_before, self.flops_after),
            ("cache", *cache),
            ("tower work", *self.tower_flops),
        ):
            parts += [f"{name} {100 * after / before:.0f} %"] if before else []
        goal = next((s.budget for s in self._plan.stages if isinstance(s.budget, Goal)), None)
        if goal is not None:
            parts.append(f"speedup {self.speedup:.2f} by FLOPs of {goal.speedup:g}")
        return ", ".join(parts) + (f" ({self.reason})" if self.reason else "")

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
    def items(self) -> list[list[list[int]]]:
        """Per sample, per item (image, clip or sound): numbers of its spans in `spans`."""
        samples = []
        for row in self.spans:
            items: dict[int | None, list[int]] = {}
            for j, span in enumerate(row):
                items.setdefault(span.item, []).append(j)
            samples.append([*items.values()])
        return samples

    @property
    def _item_budget(self) -> int | None:
        """The budget of every item in tokens; None if there is none."""
        budgets = [s.budget for s in self._plan.stages if s.budget is not None]
        given = (b for b in budgets if not b.whole_prompt and not isinstance(b, Goal))
        return next((b.tokens for b in given), None)

    @property
    def _bound(self) -> str:
        """What a budget bounds, e.g. " (at most 20 of each of 8 images)"."""
        spans = [
            row[item[0]]
            for row, found in zip(self.spans, self.items, strict=True)
            for item in found
        ]
        if self._item_budget is None or len(spans) < 2:
            return ""
        names = {span.modality for span in spans}
        name = {"image": "images", "video": "clips", "audio": "sounds"}
        media = name[names.pop()] if len(names) == 1 else "media"
        return f" (at most {self._item_budget:,} of each of {len(spans):,} {media})"

    @property
    def reason(self) -> str:
        """Why nothing was removed of what was asked for; empty if something was."""
        if not self or self.ratio > 0:
            tower = self._plan.tower if self and self._survivors is not None else None
            whole = tower is not None and not tower.decides and self.tower_ratio == 0
            return "the tower keeps every patch: tower_ratio removes none here" if whole else ""
        budget = next((s.budget for s in self._plan.stages if s.budget is not None), None)
        if budget is None or isinstance(budget, Goal):
            chosen = (self._plan.tower is not None and self._plan.tower.decides) or any(
                counts_itself(s.reducer) for s in self._plan.stages
            )
            what = "the reducer finds nothing to drop" if chosen else "too few tokens to drop one"
            return f"{what}, so the prompt is whole"
        rows = zip(self.spans, self.items, strict=True)
        sizes = [[sum(row[j].visual for j in item) for item in found] for row, found in rows]
        if budget.whole_prompt:
            largest, name = max(map(sum, sizes)), "prompt"
        else:
            largest, name = max(n for row in sizes for n in row), "image or clip"
        return (
            f"no {name} has more than {largest:,} tokens, the budget is {budget.tokens:,}: a "
            "smaller budget or ratio= compresses"
        )

    @property
    def ratio(self) -> float:
        """Achieved ratio: 1 - visual tokens seen / without compression, over layers and samples."""
        before = sum(self.tokens_before) * len(self.layers)
        after = sum(sum(seen) for seen in self.tokens_after)
        return 1.0 - after / before if before else 0.0

    def _left(self, counts: list[list[int]], entering: list[int]) -> list[int]:
        """Visual tokens of some spans that every decoder layer sees."""
        left, current = [], sum(entering)
        stages = dict(zip(self.stage_layers, map(sum, zip(*counts, strict=True)), strict=False))
        for layer in range(len(self.layers)):
            current = stages.get(layer, current)
            left.append(current)
        return left

    def _lengths_after(self) -> list[list[int]]:
        """Per prompt: tokens that every decoder layer sees."""
        lengths = []
        rows = zip(self.spans, self.counts, self.entering, self.prompts, strict=True)
        for spans, counts, entering, prompts in rows:
            # Text stays whole in every layer; visual tokens fall at the stages.
            for length, chosen in prompts:
                text = length - sum(spans[j].visual for j in chosen)
                left = self._left([counts[j] for j in chosen], [entering[j] for j in chosen])
                lengths.append([text + n for n in left])
        return lengths

    @property
    def flops_before(self) -> int:
        """FLOPs of the decoder layers for this prefill without compression."""
        lengths = [length for row in self.prompts for length, _ in row]
        return sum(layer.flops(n, self.past) for n in lengths for layer in self.layers)

    @property
    def flops_after(self) -> int:
        """FLOPs of the decoder layers with compression (without the work of the reducer)."""
        first = len(self.layers) if self.merged_from is None else self.merged_from
        return sum(
            layer.flops(n, past, i >= first)
            for row in self._lengths_after()
            for i, (layer, n, past) in enumerate(zip(self.layers, row, self.past_rows, strict=True))
        )

    @property
    def cached(self) -> list[list[int]]:
        """Per sample: rows that every decoder layer caches, without padding."""
        rows = iter(self._lengths_after())
        samples = [[next(rows) for _ in prompts] for prompts in self.prompts]
        return [[sum(layer) for layer in zip(*sample, strict=True)] for sample in samples]

    @property
    def kv_bytes_before(self) -> int:
        """Bytes of keys and values this prefill would have cached (no padding)."""
        return sum(layer.kv_bytes(n) for n in self.lengths for layer in self.layers)

    @property
    def kv_bytes_after(self) -> int:
        """Bytes of keys and values it caches for real tokens, see `cached`."""
        pairs = (pair for row in self.cached for pair in zip(self.layers, row, strict=True))
        return sum(layer.kv_bytes(n) for layer, n in pairs)

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

    @property
    def speedup(self) -> float:
        """By which factor the FLOPs up to the first token fell, in tower, projector and decoder.

        Of the decoder alone if the work of the tower is not known (`tower_flops`).
        """
        pairs = (self.flops_before, self.flops_after), self.tower_flops, self.projector_flops
        before, after = map(sum, zip(*pairs, strict=True))
        return before / after if after else 1.0

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
        numbers = {
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "ratio": self.ratio,
            "requested_ratio": self.requested_ratio,
            **({} if self.merged_from is None else {"merged_from": self.merged_from}),
            "speedup": self.speedup,
            "flops_before": self.flops_before,
            "flops_after": self.flops_after,
            "kv_bytes_before": self.kv_bytes_before,
            "kv_bytes_after": self.kv_bytes_after,
        }
        if self._survivors is None:
            return numbers
        tower, projector = self.tower_flops, self.projector_flops
        return numbers | {
            "tower_ratio": self.tower_ratio,
            "tower_kept": self.entering,
            "tower_flops_before": tower[0],
            "tower_flops_after": tower[1],
            "projector_flops_before": projector[0],
            "projector_flops_after": projector[1],
        }


def _offsets(row_map: RowMap, sample: int) -> list[list[int]]:
    pairs = [(kept, row_map.offsets_of(sample, kept)) for kept in row_map.spans[sample]]
    return [list(range(kept.count)) if o is None else o.tolist() for kept, o in pairs]


def _sums(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    firsts, seconds = zip((0, 0), *pairs, strict=True)
    return sum(firsts), sum(seconds)


def warn_of_missed_ratio(stats: Stats, plan: Plan, missed: set[str]) -> None:
    """Warn if a prompt is the first to miss the ratio of its plan by more than rounding.

    Tolerance: one token per span, or a twentieth of the tokens that should be kept. Plans whose
    reducers all choose their keep counts promise no ratio, nor does a stage in the tower that does:
    its ratio is a lower bound. `missed` holds the names of plans that have had the warning.
    """
    tower, itself = plan.tower, [counts_itself(s.reducer) for s in plan.stages]
    special = any(span.special for row in stats.spans for span in row)
    if tower is None and not special and not any(itself):
        return  # counts are only rounded
    if (tower is not None and tower.decides) or (itself and all(itself)):
        return
    planned, achieved = stats.requested_ratio, stats.ratio
    before, spans = sum(stats.tokens_before), sum(map(len, stats.spans))
    if abs(planned - achieved) <= max(0.05 * (1 - planned), spans / max(1, before)):
        return
    stages = [(s.layer, s.fraction, s.by_modality, s.budget, s.reducer.name) for s in plan.stages]
    name = f"{stages}{tower and (tower.fraction, tower.budget)}"
    if name in missed:
        return
    missed.add(name)
    warnings.warn(
        f"a prompt was planned for ratio {planned:.5g} and reached {achieved:.5g}: "
        f"{_reason(stats, itself)}. The handle's stats have the counts of every prompt. This "
        "warning appears once per plan.",
        RatioWarning,
        stacklevel=3,
    )


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
class LayerShape:
    """Sizes of a decoder layer like Llama's (gated MLP, grouped-query attention)."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2  # bytes of a number in the cache
    # Tokens that a query sees at most; None: all; 0: no attention, linear cost.
    reach: int | None = None
    # Whether it caches keys and values. Layers with a state of constant size, or with the keys of
    # another layer, do not.
    stores: bool = True

    @classmethod
    def of_config(cls, config: Any, name: str = "", mode: str | None = None) -> LayerShape:
        """Sizes of a layer from its config, the name of its type, and its KV sharing mode."""
        prefix = "swa_" if name == "hybrid_sliding" else ""
        heads = getattr(config, f"{prefix}num_attention_heads")
        kv_heads = getattr(config, f"{prefix}num_key_value_heads", None) or heads
        head_dim = getattr(config, f"{prefix}head_dim", None) or config.hidden_size // heads
        intermediate = getattr(config, "intermediate_size", None)
        if intermediate is None:  # experts alone
            experts = config.num_experts_per_tok * config.moe_intermediate_size
            intermediate = experts + (getattr(config, "shared_expert_intermediate_size", 0) or 0)
        if isinstance(intermediate, list | tuple):
            intermediate = sum(intermediate) // len(intermediate)
        # Layers without a window see all tokens (None); without attention none (0).
        layer_type = LAYER_TYPES.get(name, FULL)
        reach = getattr(config, layer_type.window_field or "", None) if layer_type.attends else 0
        stores = layer_type.attends and not str(mode).startswith("reuse")
        sizes = (config.hidden_size, intermediate, heads, kv_heads, head_dim)
        return cls(*sizes, reach=reach, stores=stores)

    def flops(self, tokens: int, past: int = 0, weighted: bool = False) -> int:
        """FLOPs for `tokens` new tokens after `past` cached ones.

        2 × weights of q, k, v, o and the three MLP matrices per token. Causal attention counts the
        visible half: 4 · heads · head_dim per (query, key) pair. The mixer of a linear layer counts
        as much as the projections of attention. `weighted` rows take a few more dimensions per head
        to attention (`merge=True`).
        """
        pairs, reach = tokens * past + tokens * (tokens + 1) // 2, self.reach
        # Reach 4, no past, 6 tokens: 1 + 2 + 3 + 4 pairs of growing queries, then 2 · 4.
        if reach is not None:  # the first queries see fewer than the window holds
            growing = min(max(reach - past, 0), tokens)
            pairs = growing * past + growing * (growing + 1) // 2 + (tokens - growing) * reach
        dim = self.head_dim + (extra_dims(self.head_dim) if weighted else 0)
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        weights = projections + 3 * self.hidden * self.intermediate
        return 2 * tokens * weights + 4 * self.heads * dim * pairs

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of keys and values that it caches for a prompt of `tokens` tokens."""
        rows = tokens if self.reach is None else min(tokens, max(self.reach - 1, 0))
        return self.stores * rows * 2 * self.kv_heads * self.head_dim * self.itemsize


def layer_shapes(config: Any, itemsize: int = 2) -> list[LayerShape]:
    """Shapes of all decoder layers of a transformers text config."""
    configs = compat.layer_configs(config)
    types = list(getattr(config, "layer_types", None) or [""] * len(configs))
    modes = compat.kv_sharing_modes(config) or [None] * len(configs)
    rows = zip(configs, types, modes, strict=False)
    return [replace(LayerShape.of_config(*row), itemsize=itemsize) for row in rows]
