"""The model's part of the plugin: reduces the features of the vision tower item by item."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.multimodal.utils import copy_mm_embedding_modality
from vllm.sequence import IntermediateTensors

from tokencomp.errors import ScoreError
from tokencomp.kernels import prepare
from tokencomp.serving.item_plan import ItemPlan, field_name
from tokencomp.serving.item_rows import batches, reduce_rows
from tokencomp.serving.offsets import OFFSETS, SIZES, split_offsets, unpack_sizes
from tokencomp.serving.vllm.checks import check_engine
from tokencomp.serving.vllm.metrics import count_nonfinite, timed
from tokencomp.serving.vllm.processing import MODALITIES, server_options
from tokencomp.serving.vllm.tower import EngineTower
from tokencomp.serving.vllm.weighted import note_in_compile_key, widen_attention

logger = init_logger("vllm.tokencomp")
STAGE = "tokencomp_{}"  # what a stage of a pipeline hands on to the next, by this name


def by_item(features: Any) -> list[Tensor]:
    """The features of a batch as one tensor (tokens, d) per item.

    LLaVA-OneVision of vLLM returns (1, tokens, d) for clips of different lengths, which ends the
    engine.
    """
    return [x.reshape(-1, x.shape[-1]) for x in (() if features is None else features)]


def finite(items: Sequence[Tensor]) -> Sequence[Tensor]:
    """`items`, tensors of shape (tokens, d), with 0 in place of non-finite values.

    Such values would remain in blocks of the KV cache, and corrupt answers to later requests.
    """
    # One pass over the rows, and the device is waited for once. A sum is not finite if a value is
    # not, or, very rarely, if large values add up.
    sums = [rows.sum(dtype=torch.float32) for rows in items]
    if not sums or torch.stack(sums).isfinite().all():
        return items
    error = ScoreError("the features of an item are not finite.")
    bad = [rows for rows in items if not torch.isfinite(rows).all()]
    for _ in bad:
        count_nonfinite(None, error)
    if not bad:
        return items
    return tuple(torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0) for rows in items)


class CompressingModel:
    """Mixin that precedes a multimodal model of vLLM in the base classes.

    With `needs_offsets`, rows carry position offsets (`checks.check_engine`). `reduced_width` is
    the number of leading columns of a row that the reducer sees; None: all.

    Rows for other engines have one width, as connectors ask for it once (`_widened`):

        | d features | size, if the engine merges | offsets, with `needs_offsets` |
    """

    needs_offsets: ClassVar[bool] = False
    reduced_width: int | None = None
    visual: Any
    language_model: Any
    make_empty_intermediate_tensors: Any
    _pending: tuple[Tensor, Tensor] | None = None  # rows of this step with offsets, and these
    _one_width: bool = False  # for all items: rows come from, or go to, other engines

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        options = server_options(vllm_config.model_config)
        check_engine(vllm_config, self.needs_offsets, options.merging)
        default = options.default.describe()
        if options.merging:
            note_in_compile_key(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # of vLLM's class
        self._row_sizes: Tensor | None = None  # of the rows of this step, if the engine merges
        if options.merging:
            self._row_sizes = widen_attention(self.language_model, vllm_config)
        self._row_budget = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self._one_width = vllm_config.ec_transfer_config is not None
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            self._stock_empty = self.make_empty_intermediate_tensors
            self.make_empty_intermediate_tensors = self._empty_stage
        self._tower: EngineTower | None = None  # made by the first request that needs it
        # Before the engine captures CUDA graphs, and before the server listens.
        device = next(self.parameters()).device  # type: ignore[attr-defined]  # a module
        prepare(device, vllm_config.model_config.dtype, torch.float32)
        logger.info("tokencomp in worker %d: default %s", os.getpid(), default)

    # -- per model ------------------------------------------------------------------------------

    @property
    def row_width(self) -> int:
        """Number of columns of an uncompressed row."""
        return self.language_model.config.hidden_size

    def pixel_rows(self, kwargs: Mapping[str, Any]) -> list[int] | None:
        """Return how many rows of pixels each item of a batch has, if they are concatenated."""
        return None

    def finish_item(
        self, plan: ItemPlan, rows: Tensor, index: Tensor, kwargs: Mapping[str, Any], item: int
    ) -> Tensor:
        """Return the rows that the engine stores; M-RoPE models append columns.

        `rows` (k, d), or (k, d + 2) with the digits of their sizes, come from the uncompressed rows
        `index` (k,). `kwargs` are the inputs of a batch, and `item` is the item's index in it.
        """
        return rows

    # -- vLLM's interface -----------------------------------------------------------------------

    def get_encoder_cudagraph_config(self) -> Any:
        """Turn CUDA graphs of the vision tower off, as they bypass `embed_multimodal`."""
        return replace(super().get_encoder_cudagraph_config(), modalities=[])  # type: ignore[misc]  # of vLLM's class

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the rows of every item as the engine stores them."""
        items = self._reduced_items(**kwargs)
        return tuple(map(self._widened, items)) if self._one_width else items

    def _widened(self, rows: Tensor) -> Tensor:
        """Rows of an item with all columns that a row of this engine can have."""
        n, width = rows.shape[0], rows.shape[1]
        parts = [rows[:, : self.row_width]]
        sized = width in (self.row_width + SIZES, self.row_width + SIZES + OFFSETS)
        if self._row_sizes is not None:
            one = rows.new_tensor([0, 1]).expand(n, SIZES)
            parts.append(rows[:, self.row_width : self.row_width + SIZES] if sized else one)
        if self.needs_offsets:
            moved = width >= self.row_width + OFFSETS
            parts.append(rows[:, -OFFSETS:] if moved else rows.new_zeros(n, OFFSETS))
        return torch.cat(parts, dim=1)

    def _reduced_items(self, **kwargs: Any) -> Sequence[Tensor]:
        """Run the vision tower on batches of limited size and reduce every item to its plan."""
        plan_fields = [kwargs.pop(field_name(m)) for m in MODALITIES if field_name(m) in kwargs]
        if not plan_fields:
            return finite(by_item(super().embed_multimodal(**kwargs)))  # type: ignore[misc]  # of vLLM's class
        plans = [ItemPlan.from_tensor(data) for data in plan_fields[0]]
        outputs: list[Tensor] = []
        towers = [p.tower for p in plans]
        for first, stop in batches([p.full for p in plans], self._row_budget, towers):
            part, items = self._slice_items(kwargs, first, stop), plans[first:stop]
            features, present = self._encode(part, items)
            for item, (plan, x) in enumerate(zip(items, by_item(features), strict=True)):
                with timed():
                    width = x.shape[1] if self.reduced_width is None else self.reduced_width
                    rows, index = reduce_rows(plan, x, width, count_nonfinite, present[item])
                    outputs.append(self.finish_item(plan, rows, index, part, item))
        return tuple(outputs)

    def media_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of media without columns of offsets, and their offsets (3, k) or zeros."""
        return split_offsets(rows, self.row_width)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Embed the tokens of a step, and note sizes and offsets of its rows.

        Both model runners call this before every step and outside of CUDA graphs. Rows of media
        lose the columns of both. The sizes are for attention, where all other rows, decoded tokens
        among them, have the size 1; `forward` adds the offsets to the positions.
        """
        width, self._pending = self.row_width, None
        embeddings = multimodal_embeddings if multimodal_embeddings is not None else ()
        if self._row_sizes is not None:
            self._row_sizes.fill_(1)
        if any(e.shape[1] > width for e in embeddings):
            rows = is_multimodal.nonzero()[:, 0]  # type: ignore[union-attr]  # of vLLM's class
            plain, offsets = zip(*map(self.media_rows, embeddings), strict=True)
            if any(e.shape[1] >= width + OFFSETS for e in embeddings):
                self._pending = rows, torch.cat(offsets, dim=1)
            if self._row_sizes is not None:
                sizes = torch.cat([unpack_sizes(x, width) for x in plain])
                self._row_sizes[rows.to(self._row_sizes.device)] = sizes.to(self._row_sizes)
            pairs = zip(embeddings, plain, strict=True)
            multimodal_embeddings = [copy_mm_embedding_modality(e, x[:, :width]) for e, x in pairs]
        return super().embed_input_ids(  # type: ignore[misc]  # of vLLM's class
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal, **kwargs
        )

    # -- stages of a pipeline -------------------------------------------------------------------

    def stage_rows(self, positions: Tensor) -> dict[str, Tensor]:
        """What the rows of this step carry to later stages, which see no media: the first axis."""
        if self._row_sizes is None:
            return {}
        return {STAGE.format("sizes"): self._row_sizes[: positions.shape[-1]]}

    def take_stage_rows(self, given: Mapping[str, Tensor], positions: Tensor) -> None:
        """Take over what `stage_rows` of the stage before has returned."""
        sizes = given.get(STAGE.format("sizes"))
        if sizes is not None and self._row_sizes is not None:
            self._row_sizes[: len(sizes)] = sizes

    def _empty_stage(self, batch_size: int, dtype: torch.dtype, device: Any) -> Any:
        """Buffers (batch_size, …) for what a stage gets, with those of `stage_rows`."""
        empty = self._stock_empty(batch_size, dtype, device)
        positions = torch.zeros(3, batch_size, dtype=torch.long, device=device)
        for name, rows in self.stage_rows(positions).items():
            empty.tensors[name] = torch.zeros_like(rows, device=device)
        return empty

    def forward(
        self, input_ids: Any, positions: Tensor, intermediate_tensors: Any = None, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run the model; in a pipeline, sizes and positions of rows travel between the stages."""
        earlier = intermediate_tensors
        if earlier is not None:
            prefix = STAGE.format("")
            given = {n: x for n, x in earlier.tensors.items() if n.startswith(prefix)}
            others = {n: x for n, x in earlier.tensors.items() if n not in given}
            self.take_stage_rows(given, positions)
            earlier = IntermediateTensors(others)
        out = super().forward(input_ids, positions, earlier, *args, **kwargs)  # type: ignore[misc]  # of vLLM's class
        if isinstance(out, IntermediateTensors):
            out.tensors.update(self.stage_rows(positions))
        return out

    def _encode(
        self, part: dict[str, Any], plans: list[ItemPlan]
    ) -> tuple[Any, Sequence[Tensor | None]]:
        """Return the rows of items with equal stages in the tower, see `EngineTower.encode`."""
        embed = functools.partial(super().embed_multimodal, **part)  # type: ignore[misc]  # of vLLM's class
        if plans[0].tower is None:
            return embed(), [None] * len(plans)
        if self._tower is None:
            self._tower = EngineTower(self.visual, count_nonfinite)
        return self._tower.encode(embed, plans)

    def _slice_items(self, kwargs: Mapping[str, Any], first: int, stop: int) -> dict[str, Any]:
        """Return the inputs of items `first … stop - 1`; what all items share stays whole."""
        # Pixels are rows of all items together; grids and plans have one entry per item.
        rows = self.pixel_rows(kwargs)
        pixels = slice(first, stop) if rows is None else slice(sum(rows[:first]), sum(rows[:stop]))
        return {
            name: value
            if isinstance(value, Tensor) and value.ndim == 0
            else value[pixels if name.startswith("pixel_values") else slice(first, stop)]
            for name, value in kwargs.items()
        }
