"""What the last compressed call saved, exactly: tokens per layer, FLOPs, KV bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokencomp.engine.count.flops import DecoderShape
from tokencomp.engine.rows.layout import RowLayout
from tokencomp.engine.tower.flops import TowerCost
from tokencomp.errors import OptionError
from tokencomp.plan.budgets import Place
from tokencomp.plan.plan import Plan
from tokencomp.tokens.spans import VisualSpan

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
    _plan: Plan = field(default_factory=Plan)
    _places: list[list[Place | None]] = field(default_factory=list)
    _kept: list[RowLayout] = field(default_factory=list, repr=False)
    _survivors: RowLayout | None = field(default=None, repr=False)
    _repeated: list[list[int]] = field(default_factory=list, repr=False)
    _off: bool = field(default=False, repr=False)

    @classmethod
    def empty(cls, config: Any, active: bool) -> Stats:
        """Counts of no prefill; `active` says whether prompts are compressed, and thus counted."""
        return cls([], [], [], [], _config=config, _off=not active)

    @functools.cached_property
    def shape(self) -> DecoderShape:
        """Sizes of the decoder."""
        return DecoderShape.from_config(self._config, self._itemsize)

    @property
    def stage_layers(self) -> list[int]:
        """Decoder layer of each stage."""
        return [stage.layer for stage in self._plan.stages]

    @property
    def merged_from(self) -> int | None:
        """Decoder layer before which tokens that leave are first merged into kept ones.

        None: all are dropped.
        """
        stages = (
            self._plan.merging(*item)
            for rows in zip(self.spans, self.counts, self._places, strict=True)
            for item in zip(*rows, strict=True)
        )
        return min((stage.layer for stage in stages if stage is not None), default=None)

    @functools.cached_property
    def entering(self) -> list[list[int]]:
        """Per sample, per span: visual tokens that left the vision tower for the decoder."""
        return [[self._plan.entering(span) for span in row] for row in self.spans]

    @functools.cached_property
    def requested_ratio(self) -> float:
        """The ratio that the plan was to reach, before rounding to tokens and special tokens.

        Of a budget: what it comes to for these items.
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
        """Per prompt: the tokens that every decoder layer sees."""
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
        """FLOPs of the decoder layers with compression (the reducer's own work not included)."""
        pasts, count, rows = self.past_rows, self.shape.layer_flops, self._lengths_after()
        first = self.shape.num_layers if self.merged_from is None else self.merged_from
        return sum(count(n, pasts[i], i, i >= first) for row in rows for i, n in enumerate(row))

    @property
    def cached(self) -> list[list[int]]:
        """Per sample: the rows that every decoder layer caches (padding of a ragged batch apart).

        Rows of merged tokens are cached as often as the tokens that they stand for.
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
        """Offsets inside each span that left the vision tower: `tower_kept(b)[span]`."""
        if self._survivors is None:
            return [list(range(span.length)) for span in self.spans[sample]]
        return _offsets(self._survivors, sample)

    def kept(self, sample: int = 0) -> list[list[list[int]]]:
        """Offsets inside each span that are left, per stage: `kept(b)[stage][span]`."""
        return [_offsets(layout, sample) for layout in self._kept]

    def pooling_mask(self, attention_mask: Tensor) -> Tensor:
        """The padding mask of a batch, without the columns that have left.

        Hidden states have full length, and a dropped column repeats the one before it. A mean over
        tokens, or an index of page vectors, must take kept columns alone.

        Parameters
        ----------
        attention_mask : Tensor, shape (B, L)
            Of the batch that was counted last; it stays as it is.

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


def _offsets(layout: RowLayout, sample: int) -> list[list[int]]:
    """Offsets inside their span of the tokens that are left of every span of a sample."""
    kept_spans = layout.spans[sample]
    rows = [layout.index_of(sample, live) for live in kept_spans]
    pairs = zip(kept_spans, rows, strict=True)
    return [list(range(live.count)) if i is None else i.tolist() for live, i in pairs]


def _sums(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The sums of the first and of the second numbers."""
    firsts, seconds = zip((0, 0), *pairs, strict=True)
    return sum(firsts), sum(seconds)
