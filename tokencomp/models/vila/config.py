"""Configuration of VILA and NVILA."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tokencomp.models.vila.projector import tokens_per_side


class VilaConfig(PretrainedConfig):
    """Configurations of the parts of a VILA model, and the rules that turn media into tokens.

    Attributes
    ----------
    text_config, vision_config
        Configurations of a stock Llama or Qwen2 model and of a stock SigLIP vision model.
    projector_type
        The `mm_projector_type` of the checkpoint.
    select_layer
        Index of the tower's hidden state that is projected.
    image_token_id, video_token_id
        Ids of the placeholder tokens. They need not be in the embedding table.
    image_ends, video_ends
        Token ids before and after every image and every frame of a video, for example
        ([], [newline]).
    video_pool
        Block (t, h, w) of projected video tokens that is averaged into one token.
    num_video_frames
        Number of frames that are sampled from a video.
    image_aspect_ratio
        "resize" squeezes an image into the tower's square, and "pad" adds borders. "dynamic" cuts
        the image of a prompt with a single image into `min_tiles … max_tiles` tiles and adds a
        thumbnail.
    chat_template
        Name of a conversation format, for tokenizers that have none of their own.
    root
        The content of the checkpoint's config.json, so that saving writes back all of it.
    """

    model_type = "llava_llama"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        projector_type: str = "mlp_downsample",
        select_layer: int = -2,
        image_token_id: int = 0,
        video_token_id: int = 1,
        image_ends: tuple[list[int], list[int]] = ((), ()),  # type: ignore[assignment]  # JSON has no tuples
        video_ends: tuple[list[int], list[int]] = ((), ()),  # type: ignore[assignment]  # JSON has no tuples
        video_pool: tuple[int, int, int] = (1, 1, 1),
        num_video_frames: int = 8,
        image_aspect_ratio: str = "resize",
        min_tiles: int = 1,
        max_tiles: int = 12,
        chat_template: str | None = None,
        root: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _part(text_config, "qwen2")
        self.vision_config = _part(vision_config, "siglip_vision_model")
        self.projector_type, self.select_layer = projector_type, select_layer
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        self.image_ends = tuple(list(ids) for ids in image_ends)
        self.video_ends = tuple(list(ids) for ids in video_ends)
        self.video_pool = tuple(video_pool)
        self.num_video_frames, self.image_aspect_ratio = num_video_frames, image_aspect_ratio
        self.min_tiles, self.max_tiles = min_tiles, max_tiles
        self.chat_template = chat_template
        self.root = root or {}
        super().__init__(**kwargs)

    @property
    def patches_per_side(self) -> int:
        """Number of vision patches along one side of the tower's square input."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def side(self) -> int:
        """Number of tokens per side of an image or frame, before video pooling."""
        return tokens_per_side(self.projector_type, self.patches_per_side)


def _part(config: Any, default: str) -> PretrainedConfig:
    """Build the configuration of a part from a dict; `default` is its type if the dict has none."""
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(config or {})
    return AutoConfig.for_model(config.pop("model_type", default), **config)
