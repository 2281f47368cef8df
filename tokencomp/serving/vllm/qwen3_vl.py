"""Qwen3-VL and its MoE variant for vLLM, with deepstack features and timestamps between frames.

Reducers see the features that enter the decoder. The features of intermediate vision layers follow
the kept tokens, as in `tokencomp.patch`. The number of kept tokens per frame is known only after
the vision tower has run. A compressed video is therefore one run of placeholders, which the worker
fills with the tokens of the frames, and with the timestamps and marks between them, in order and at
positions of text. An encoder in another process hands on the ids of this text, and the decoder
embeds them. The engine's encoder cache holds all of these rows. The engine refuses a video if its
kept tokens and its text together exceed the largest uncompressed item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal.processing import PromptUpdateDetails

from tokencomp.serving.item_plan import ItemPlan
from tokencomp.serving.offsets import OFFSETS, grid_offsets, split_text, with_offsets, with_text
from tokencomp.serving.vllm import mrope


def frame_offsets(media: np.ndarray, h: int, w: int) -> np.ndarray:
    """Offsets (3, n) of a video, in which `media` (n,) marks the patches of its h × w frames.

    A frame advances the position by max(h, w), a text token between frames by 1.
    """
    # Frames of 1 × 2 patches (m) after text (t):
    #     t m m t m m      done 0 0 1 2 2 3      offsets of time 0 1 1 3 4 4
    done = np.cumsum(media) - media  # number of patches before every token
    base = np.arange(len(media)) - done + done // (h * w) * max(h, w)
    inside = done % (h * w)
    return base + np.stack([np.zeros_like(inside), inside // w, inside % w])


class Qwen3VLProcessor(mrope.MRopeProcessor):
    """Videos as one run of placeholders."""

    def extents(self, modality: str, layouts: Any, hf_inputs: Any) -> list[int]:
        """t · max(h, w) per item; the text between frames has positions of its own."""
        return [t * max(h, w) for t, h, w in (spans[0].grid for spans in layouts)]

    def shorten(self, tokens: Any, plan: ItemPlan) -> Any:
        """One run of placeholders for a video and its text: the model must know what gets rows."""
        if plan.modality == "image":
            return super().shorten(tokens, plan)
        if plan.kept == plan.full:
            return tokens
        pad = self.info.get_hf_config().video_token_id
        media = [i for i in tokens.full if i == pad]
        super().shorten(media, plan)  # only checks the count
        text = len(tokens.full) - len(media)
        return PromptUpdateDetails.from_seq([pad] * (text + plan.kept))


class Qwen3VLModel(mrope.MRopeModel):
    """Deepstack features and the text between frames, for the dense and the MoE variant."""

    visual_dim: int
    multiscale_dim: int

    @property
    def row_width(self) -> int:
        return self.visual_dim + self.multiscale_dim

    @property
    def reduced_width(self) -> int | None:  # type: ignore[override]  # of vLLM's class
        return self.visual_dim

    def _video_ids(self, stamps: Any, counts: Sequence[int]) -> Tensor:
        """Return the token ids of a video with `counts` patches in each frame."""
        details = Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=list(counts),
            timestamps=stamps,
            tokenizer=self._tokenizer,  # type: ignore[attr-defined]  # of vLLM's class
            vision_start_token_id=self.config.vision_start_token_id,
            vision_end_token_id=self.config.vision_end_token_id,
            video_token_id=self.config.video_token_id,
        )
        return torch.tensor(details.full)

    def _full_video(self, stamps: Any, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return the offsets (3, n) of an uncompressed video and the mask (n,) of its patches."""
        t, h, w = grid
        media = self._video_ids(stamps, [h * w] * t) == self.config.video_token_id
        return torch.from_numpy(frame_offsets(media.numpy(), h, w)), media

    def finish_item(
        self, plan: ItemPlan, rows: Tensor, index: Tensor, kwargs: Mapping[str, Any], item: int
    ) -> Tensor:
        """Insert the text between the frames and append the offsets of all rows."""
        if plan.modality == "image" or rows.shape[0] == plan.full:
            return super().finish_item(plan, rows, index, kwargs, item)
        stamps, (t, h, w) = kwargs["timestamps"][item], plan.spans[0].grid
        index = index.cpu()
        ids = self._video_ids(stamps, torch.bincount(index // (h * w), minlength=t).tolist())
        media = ids == self.config.video_token_id
        full, was_media = self._full_video(stamps, (t, h, w))
        offsets = torch.empty(3, len(ids), dtype=torch.long)
        offsets[:, media], offsets[:, ~media] = full[:, was_media][:, index], full[:, ~was_media]
        out = rows.new_zeros(len(ids), rows.shape[1])
        out[:, self.row_width + 1 :] = 1  # low digit of the size, where rows have one
        out[media.to(rows.device)] = rows
        if isinstance(self.language_model, StageMissingLayer):  # an encoder in another process
            return torch.cat([out, with_text(offsets, ids, ~media).to(out)], dim=1)
        words = self.language_model.embed_input_ids(ids.to(rows.device))
        out[~media, : self.visual_dim] = words[~media]
        return with_offsets(out, offsets)

    def media_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the text between frames of an encoder, whose rows have ids and no features."""
        if not self._one_width or rows.shape[1] < self.row_width + OFFSETS:
            return super().media_rows(rows)  # rows of this process
        plain, offsets = super().media_rows(rows)
        offsets, ids, text = split_text(offsets)
        words = self.language_model.embed_input_ids(ids)
        first, others = plain[:, : self.visual_dim], plain[:, self.visual_dim :]
        return torch.cat([torch.where(text[:, None], words, first), others], dim=1), offsets

    def full_offsets(self, feature: Any) -> np.ndarray:
        merge = self.config.vision_config.spatial_merge_size
        t, h, w = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
        grid = t, h // merge, w // merge
        if feature.modality == "image":
            return grid_offsets(grid, 1.0)
        return self._full_video(feature.data["timestamps"].data, grid)[0].numpy()


MIXINS = {"Model": Qwen3VLModel, "Processor": Qwen3VLProcessor}
