"""Stand-ins for SGLang's processor, vision tower and decoder, around its own embedding of media.

The module needs SGLang's Python files, but not its compiled parts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers import mm_utils
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    MultimodalProcessorOutput,
)

from support.serving import hf_reference
from tokencomp.serving.sglang.embedding import around_routine


def processed(folder: Any, job: dict[str, Any]) -> MultimodalProcessorOutput:
    """Return what SGLang's processor returns for a job, from the inputs of transformers."""
    model, _ = hf_reference.load(folder)
    inputs, config = hf_reference.inputs_of(folder, job), model.config
    ids = inputs["input_ids"][0].tolist()
    items, at = [], 0
    waiting = {"image": [0, 0], "video": [0, 0]}  # items and rows of pixels that are done
    pads = {config.image_token_id: "image", config.video_token_id: "video"}
    while at < len(ids):
        kind = pads.get(ids[at])
        if kind is None:
            at += 1
            continue
        index, row = waiting[kind]
        grid = inputs[f"{kind}_grid_thw"][index : index + 1]
        patches = int(grid.prod())
        pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
        offsets, left = [], patches // 4
        while left:  # a video of Qwen3-VL is several runs of placeholders
            while ids[at] not in pads:
                at += 1
            start = at
            while left and ids[at] in pads:
                at, left = at + 1, left - 1
            offsets.append((start, at - 1))
        item = MultimodalDataItem(
            modality=Modality[kind.upper()], feature=pixels[row : row + patches],
            offsets=offsets, model_specific_data={f"{kind}_grid_thw": grid},
        )  # fmt: skip
        item.set_pad_value()
        items.append(item)
        waiting[kind] = [index + 1, row + patches]
    positions = hf_reference.true_positions(folder, job)
    delta = positions.max() + 1 - len(ids)
    return MultimodalProcessorOutput(
        mm_items=items, input_ids=ids, mrope_positions=positions,
        mrope_position_delta=delta.reshape(1, 1),
    )  # fmt: skip


class Tower:
    """A model of SGLang as its embedding of media sees it, with the features of transformers."""

    def __init__(self, model: Any) -> None:
        self._model, self.config = model, model.config
        self.get_input_embeddings = model.get_input_embeddings
        vision = model.config.vision_config
        self.deepstack_visual_indexes = getattr(vision, "deepstack_visual_indexes", [])

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        return self._rows(items, "image")

    def get_video_feature(self, items: list[Any]) -> torch.Tensor:
        return self._rows(items, "video")

    def _rows(self, items: list[Any], kind: str) -> torch.Tensor:
        pixels = torch.cat([item.feature for item in items])
        grids = torch.cat([item.model_specific_data[f"{kind}_grid_thw"] for item in items])
        out = self._model.get_image_features(pixels, grids)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
        return torch.cat([torch.cat(tuple(level)) for level in levels], dim=1)


class Decoder:
    """Records what SGLang hands to the decoder."""

    def __init__(self, model: Any) -> None:
        self.get_input_embeddings = model.get_input_embeddings
        self.rows: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.deepstack: list[torch.Tensor] = []

    def __call__(
        self, input_ids: None, positions: torch.Tensor, forward_batch: Any, input_embeds: Any,
        input_deepstack_embeds: Any = None,
    ) -> None:  # fmt: skip
        self.rows.append(input_embeds)
        self.positions.append(positions)
        if input_deepstack_embeds is not None:
            self.deepstack.append(input_deepstack_embeds)


def embedded(
    model: Any, output: MultimodalProcessorOutput, windows: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return rows, positions and deepstack features of a prompt that SGLang prefills in windows."""
    decoder, tower, start = Decoder(model), Tower(model), 0
    for n in windows:
        no = lambda: False  # noqa: E731
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=no, is_target_verify=no), input_embeds=None,
            contains_mm_inputs=lambda: True, spec_algorithm=None, extend_seq_lens_cpu=[n],
            mm_inputs=[MultimodalInputs(mm_items=output.mm_items)], extend_prefix_lens_cpu=[start],
        )  # fmt: skip
        own = output.mrope_positions[:, start : start + n].clone()
        around_routine(
            mm_utils.general_mm_embed_routine,
            input_ids=torch.tensor(output.padded_input_ids[start : start + n]),
            forward_batch=batch, language_model=decoder, multimodal_model=tower, positions=own,
        )  # fmt: skip
        assert decoder.positions[-1] is own  # corrected in place, as graphs read this tensor
        start += n
    deepstack = torch.cat(decoder.deepstack) if decoder.deepstack else None
    return torch.cat(decoder.rows), torch.cat(decoder.positions, dim=1), deepstack
