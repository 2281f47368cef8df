"""VILA and NVILA (arXiv 2312.07533, 2412.04468), built from stock transformers models.

The parts are a Llama or Qwen2 language model, a SigLIP vision tower and a projector. The model
loads and saves the published folder layout: config.json, llm/, vision_tower/ and mm_projector/.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    SiglipVisionModel,
)

from tokencomp.errors import SpanError
from tokencomp.models.vila.config import VilaConfig
from tokencomp.models.vila.projector import VilaProjector, load_projector, save_projector
from tokencomp.models.vila.root import read_config, read_root, root_of
from tokencomp.models.vila.tokens import load_tokenizer
from tokencomp.storage import write_json

IGNORED = ("config", "trust_remote_code")  # options of the Auto classes, see `from_pretrained`
MEDIA = ("pixel_values", "pixel_values_videos", "video_frames")


class VilaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A stock causal LM whose placeholder tokens are replaced by image and video features.

    `llm` is a `LlamaForCausalLM` or `Qwen2ForCausalLM`.
    """

    config_class = VilaConfig
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = True
    _supports_attention_backend = supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "Qwen2DecoderLayer", "SiglipEncoderLayer"]  # noqa: RUF012

    def __init__(
        self,
        config: VilaConfig,
        llm: PreTrainedModel | None = None,
        vision_tower: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.post_init()  # runs before the parts exist, which initialise or load themselves
        self.llm = llm or AutoModelForCausalLM.from_config(config.text_config)
        self.vision_tower = vision_tower or SiglipVisionModel(config.vision_config)  # type: ignore[arg-type]  # no dict
        self.mm_projector = VilaProjector(
            config.projector_type,
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
        )
        self.generation_config = copy.deepcopy(self.llm.generation_config)

    # -- folders --------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]  # local folders only
        cls,
        folder: str | Path,
        **kwargs: Any,
    ) -> VilaForConditionalGeneration:
        """Load a local folder in the published layout.

        Options such as `dtype`, `attn_implementation` and `device_map` go to the LLM and the tower.
        Raises `CheckpointError` if a part is of a kind that cannot be built, and the `OSError` of
        transformers if one is missing.
        """
        folder = Path(folder)
        # Names with an underscore are notes of the Auto class that has called this method.
        kwargs = {k: v for k, v in kwargs.items() if k not in IGNORED and k[0] != "_"}
        known = "media_tokens" in read_root(folder)
        tokenizer = None if known else load_tokenizer(folder)
        config = read_config(folder, tokenizer)
        llm = AutoModelForCausalLM.from_pretrained(folder / "llm", **kwargs)
        tower = SiglipVisionModel.from_pretrained(folder / "vision_tower", **kwargs)
        config.text_config, config.vision_config = llm.config, tower.config
        model = cls(config, llm, tower)
        load_projector(model.mm_projector, folder / "mm_projector")
        model.mm_projector.to(device=tower.device, dtype=llm.dtype)
        model.name_or_path = str(folder)
        return model.eval()

    def save_pretrained(  # type: ignore[override]  # fewer arguments
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Write the folder layout that `from_pretrained` reads.

        `VilaProcessor.save_pretrained` writes the tokenizer and the image processor.
        """
        folder = Path(save_directory)
        (folder / "mm_projector").mkdir(parents=True, exist_ok=True)
        self.llm.save_pretrained(folder / "llm", **kwargs)
        self.vision_tower.save_pretrained(folder / "vision_tower", **kwargs)
        save_projector(self.mm_projector, folder / "mm_projector")
        projector = {"mm_projector_type": self.mm_projector.kind, "model_type": "v2l_projector"}
        write_json(folder / "mm_projector" / "config.json", projector)
        write_json(folder / "config.json", root_of(self.config))

    # -- parts ----------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.llm.model

    # -- media ----------------------------------------------------------------------------------

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Map images (N, 3, S, S) to features (N, side², hidden_size)."""
        weight = next(self.vision_tower.parameters())
        pixels = pixels.to(device=weight.device, dtype=weight.dtype)
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        return self.mm_projector(states[self.config.select_layer])

    def encode_videos(self, pixels: Tensor, frames: list[int]) -> Tensor:
        """Map the frames of all videos to features (tokens of all videos, hidden_size).

        `pixels` is (sum of `frames`, 3, S, S), and `frames` has the number of frames of each video.
        """
        features, side = self.encode_images(pixels), self.config.side
        t, h, w = self.config.video_pool
        if (t, h, w) == (1, 1, 1):
            return features.flatten(0, 1)
        pooled = []
        for video in features.view(-1, side, side, features.shape[-1]).split(frames):
            blocks = video.view(-1, t, side // h, h, side // w, w, video.shape[-1])
            pooled.append(blocks.mean(dim=(1, 3, 5)).flatten(0, 2))
        return torch.cat(pooled)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
    ) -> Tensor:
        """Return embeddings (B, L, hidden_size) with media features at their placeholders."""
        image, video = self._placeholders(input_ids)
        # Ids of placeholders may lie past the end of the embedding table, so 0 replaces them.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(image | video, 0))
        for kind, mask, pixels in (
            ("pixel_values", image, pixel_values),
            ("pixel_values_videos", video, pixel_values_videos),
        ):
            if pixels is None and input_ids.shape[1] > 1 and bool(mask.any()):
                raise SpanError(f"{int(mask.sum())} placeholders, but no {kind}. Pass them too.")
        if pixel_values is not None:
            features = self.encode_images(pixel_values).flatten(0, 1)
            embeds = splice(embeds, image, features, "image")
        if pixel_values_videos is not None:
            frames = [len(pixel_values_videos)] if video_frames is None else video_frames.tolist()
            features = self.encode_videos(pixel_values_videos, frames)
            embeds = splice(embeds, video, features, "video")
        return embeds

    def _placeholders(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the masks (B, L) of image placeholders and of video placeholders."""
        return input_ids == self.config.image_token_id, input_ids == self.config.video_token_id

    # -- calls ----------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model on text and media and return its output.

        `input_ids` (B, L) have one placeholder per feature, as the processor returns them.
        `pixel_values` are images and tiles of the batch, `pixel_values_videos` frames, (n, 3, S, S)
        each, and `video_frames` the number of frames of each video, int64. `cache` and
        `past_key_values` are the KV cache under its new and its old name. Raises `SpanError` if
        `inputs_embeds` and media are both passed, or placeholders do not match the media.
        """
        held = past_key_values if cache is None else cache
        if held is not None:  # a language model ignores the name that it does not know
            known = inspect.signature(type(self.llm).forward).parameters
            kwargs["cache" if "cache" in known else "past_key_values"] = held
        media = zip(MEDIA, (pixel_values, pixel_values_videos, video_frames), strict=True)
        media_names = [name for name, value in media if value is not None]
        if inputs_embeds is not None and media_names:
            raise SpanError(
                f"inputs_embeds together with {', '.join(media_names)}: embeddings contain the "
                "media features already. Pass the media with input_ids, or the result of "
                "`embed(input_ids, ...)` without media."
            )
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed(input_ids, pixel_values, pixel_values_videos, video_frames)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Pass media on in the steps whose new tokens have placeholders, and in no other step."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        ids = inputs.get("input_ids")  # without the tokens that are in the cache
        if ids is not None:
            new = ids.shape[1] > 1 and any(bool(mask.any()) for mask in self._placeholders(ids))
            # transformers drops the media when assisted generation starts, so they are set again.
            inputs.update({name: kwargs.get(name) if new else None for name in MEDIA})
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Repeat the media of a sample as a group: [A, B] becomes [A, B, A, B]."""
        media = {name: kwargs.pop(name) for name in MEDIA if kwargs.get(name) is not None}
        if input_ids is not None and expand_size > 1:
            media = expanded(media, input_ids, expand_size, self.config, self.config.side**2)
        ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]  # of a mixin
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,  # type: ignore[arg-type]  # or None
            **kwargs,
        )
        return ids, {**kwargs, **media}


def expanded(
    media: dict[str, Tensor], ids: Tensor, times: int, config: Any, per_image: int
) -> dict[str, Tensor]:
    """Repeat media per sample, whose number of images and frames follows from its tokens."""
    t, h, w = config.video_pool
    frames = (ids == config.video_token_id).sum(1) * (t * h * w) // per_image
    out = {}
    if "pixel_values" in media:
        images = (ids == config.image_token_id).sum(1) // per_image
        out["pixel_values"] = _repeat(media["pixel_values"], images.tolist(), times)
    if "pixel_values_videos" in media:
        pixels = media["pixel_values_videos"]
        out["pixel_values_videos"] = _repeat(pixels, frames.tolist(), times)
    if "video_frames" in media:
        ends, videos = frames.cumsum(0).tolist(), media["video_frames"].cumsum(0).tolist()
        bounds = itertools.pairwise([0, *ends])
        counts = [sum(low < v <= high for v in videos) for low, high in bounds]
        out["video_frames"] = _repeat(media["video_frames"], counts, times)
    return out


def _repeat(x: Tensor, counts: list[int], times: int) -> Tensor:
    """Split `x` into groups of `counts` rows and repeat each group as a whole."""
    return torch.cat([part for group in x.split(counts) for part in [group] * times])


def splice(embeds: Tensor, where: Tensor, features: Tensor, kind: str) -> Tensor:
    """Write features (N, hidden_size) to the N positions of the mask `where` (B, L)."""
    if int(where.sum()) != len(features):
        raise SpanError(
            f"{int(where.sum())} {kind} placeholders for {len(features)} {kind} features. Create "
            "input_ids and pixels of a prompt with one call of VilaProcessor."
        )
    return embeds.masked_scatter(where[..., None].to(embeds.device), features.to(embeds))
