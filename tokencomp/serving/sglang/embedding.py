"""The worker's part of the SGLang plugin: it reduces rows, and corrects positions.

SGLang splits rows of media into embeddings and deepstack features, scatters both to their tokens,
also for chunks of a prompt, and hands the latter to the decoder. The digits of the position offsets
travel as one more level of deepstack features, which is removed before the decoder sees them. So
all rows of a server that may compress are one level wider.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokencomp.errors import ScoreError
from tokencomp.serving.item_plan import ItemPlan
from tokencomp.serving.item_rows import batches, reduce_rows
from tokencomp.serving.offsets import pack_offsets, unpack_offsets
from tokencomp.serving.sglang.processing import OFFSETS, PLAN, TEXT

logger = logging.getLogger("sglang.srt.tokencomp")
DIGITS = 6
ROW_BUDGET = 16384  # uncompressed rows that one call of the vision tower may have


def around_routine(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run SGLang's embedding of media and its decoder with compressed media."""
    from sglang.srt.managers.schedule_batch import Modality

    model = Compressing(kwargs["multimodal_model"])
    kwargs["multimodal_model"] = model
    kwargs["language_model"] = CorrectingPositions(kwargs["language_model"], model.levels)
    kwargs["use_deepstack"] = {Modality.IMAGE: True, Modality.VIDEO: True}
    return original(*args, **kwargs)


class Compressing:
    """Called by SGLang in place of the model; one more than its `levels` of features."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.levels = len(getattr(model, "deepstack_visual_indexes", ()))
        self.deepstack_visual_indexes = [0] * (self.levels + 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_image_feature(self, items: list[Any]) -> list[Tensor]:
        return self._features(items, self._model.get_image_feature, "image")

    def get_video_feature(self, items: list[Any]) -> list[Tensor]:
        return self._features(items, self._model.get_video_feature, "video")

    def separate_deepstack_embeds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split rows (k, (levels + 2)·d) into embeddings (k, d) and the rest."""
        width = rows.shape[-1] // (self.levels + 2)
        return rows[:, :width], rows[:, width:]

    def _features(
        self, items: list[Any], encode: Callable[..., Any], modality: str
    ) -> list[Tensor]:
        """Run the vision tower on batches of limited size and reduce every item to its plan."""
        merge = self._model.config.vision_config.spatial_merge_size
        grids = [item.model_specific_data[f"{modality}_grid_thw"] for item in items]
        sizes = [int(grid.prod(-1).sum()) // merge**2 for grid in grids]
        outputs: list[Tensor] = []
        for first, stop in batches(sizes, ROW_BUDGET):
            features = encode(items[first:stop])
            if isinstance(features, list):
                features = torch.cat([x.reshape(-1, x.shape[-1]) for x in features])
            parts = features.reshape(-1, features.shape[-1]).split(sizes[first:stop])
            outputs += map(self._reduced, items[first:stop], parts)
        return outputs

    def _reduced(self, item: Any, rows: Tensor) -> Tensor:
        """Return the kept rows of an item and one more level with their digits."""
        width = rows.shape[1] // (self.levels + 1)
        if PLAN not in item.model_specific_data:
            return torch.cat([rows, rows.new_zeros(len(rows), width)], dim=1)
        plan = ItemPlan.from_tensor(item.model_specific_data[PLAN].cpu())
        rows, index = reduce_rows(plan, rows, width, _warn)
        text = item.model_specific_data[TEXT].long().cpu()
        columns = (text < 0).nonzero()[:, 0][index.cpu()]  # of the kept rows
        stays = text >= 0
        stays[columns] = True
        text = text[stays].to(rows.device)
        digits = rows.new_zeros(len(text), width)
        offsets = item.model_specific_data[OFFSETS].long().cpu()[:, stays]
        digits[:, :DIGITS] = pack_offsets(offsets, rows.dtype).to(rows.device)
        if len(digits) > len(rows):  # text between frames
            media, rows = rows, rows.new_zeros(len(digits), rows.shape[1])
            rows[text < 0] = media
            rows[text >= 0, :width] = self._model.get_input_embeddings()(text[text >= 0]).to(rows)
        return torch.cat([rows, digits], dim=1)


class CorrectingPositions:
    """A decoder that adds the offsets of its rows to their base positions."""

    def __init__(self, decoder: Any, levels: int) -> None:
        self._decoder, self._levels = decoder, levels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def __call__(self, *args: Any, positions: Tensor, **kwargs: Any) -> Any:
        """Add offsets to positions (3, n), in place, as prefill graphs read the engine's own."""
        deepstack = kwargs.pop("input_deepstack_embeds", None)
        if deepstack is not None:
            width = deepstack.shape[-1] // (self._levels + 1)
            digits = deepstack[:, self._levels * width :][:, :DIGITS]
            positions += unpack_offsets(digits).to(positions)
            if self._levels:
                kwargs["input_deepstack_embeds"] = deepstack[:, : self._levels * width]
        return self._decoder(*args, positions=positions, **kwargs)


def _warn(plan: ItemPlan, error: ScoreError) -> None:
    logger.warning("tokencomp, %s: %s The item keeps evenly spaced tokens.", plan.reducer, error)
