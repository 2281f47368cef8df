"""The model half: runs the vision tower as before, then reduces every item to its plan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger

from tokencomp.serving.vllm.checks import check_engine
from tokencomp.serving.vllm.item_plan import ItemPlan, field_name
from tokencomp.serving.vllm.metrics import ReduceTimer
from tokencomp.serving.vllm.processing import KINDS, server_options

logger = init_logger("vllm.tokencomp")


class CompressingModel:
    """Mixin in front of a vLLM multimodal model."""

    needs_offsets: ClassVar[bool] = False
    reduced_width: int | None = None  # leading columns that reducers see; None: all

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config, self.needs_offsets)
        default = server_options(vllm_config.model_config).default.describe()
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._row_budget = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self._timer = ReduceTimer()
        logger.info("tokencomp in worker %d: default %s", os.getpid(), default)

    # -- per model ------------------------------------------------------------------------------

    def slice_items(self, kwargs: Mapping[str, Any], first: int, stop: int) -> dict[str, Any]:
        """Inputs of items `first … stop - 1` of a batch; here every input is batched by item."""
        return {name: value[first:stop] for name, value in kwargs.items()}

    def finish_item(
        self, plan: ItemPlan, rows: Tensor, index: Tensor, kwargs: Mapping[str, Any], item: int
    ) -> Tensor:
        """Rows as the engine stores them. Models with M-RoPE add columns."""
        return rows

    # -- vLLM's interface -----------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> Any:
        found = [kwargs.pop(field_name(m)) for m in KINDS if field_name(m) in kwargs]
        if not found:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        plans = [ItemPlan.from_tensor(data) for data in found[0]]
        outputs: list[Tensor] = []
        for first, stop in batches([p.full for p in plans], self._row_budget):
            part = self.slice_items(kwargs, first, stop)
            features = super().embed_multimodal(**part)  # type: ignore[misc]
            for item, (plan, x) in enumerate(zip(plans[first:stop], features, strict=True)):
                with self._timer(plan):
                    rows, index = self._reduce(plan, x.reshape(-1, x.shape[-1]))
                    outputs.append(self.finish_item(plan, rows, index, part, item))
        return tuple(outputs)

    def _reduce(self, plan: ItemPlan, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.reduced_width is None:
            return plan.reduce(x)
        rows, index = plan.reduce(x[:, : self.reduced_width])
        return torch.cat([rows, x[index, self.reduced_width :]], dim=1), index


class NoEncoderGraphs:
    """Mixin: the captured vision tower bypasses `embed_multimodal`, so nothing is captured."""

    def get_encoder_cudagraph_config(self) -> Any:
        return replace(super().get_encoder_cudagraph_config(), modalities=[])  # type: ignore[misc]


def batches(sizes: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Cut items into runs of at most `budget` uncompressed rows (at least one item each).

    The scheduler admits media by the rows that are left of them; the vision tower's memory grows
    with the rows before.
    """
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if total and total + size > budget:
            yield first, i
            first, total = i, 0
        total += size
    yield first, len(sizes)
