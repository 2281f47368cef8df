"""Configuration of VILA and NVILA, which is stored in the published folder layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tokencomp.errors import CheckpointError

PARTS = {"llm": "the language model", "vision_tower": "SigLIP", "mm_projector": "the projector"}
UNSUPPORTED = {
    "s2": "multi-scale features",
    "dynamic_s2": "multi-scale features",
    "mm_use_im_start_end": "image start and end tokens",
}
ASPECTS = ("resize", "pad", "dynamic")
MODEL_TYPES = ("llava_llama", "vila")


class VilaConfig(PretrainedConfig):
    """Configurations of the parts of a VILA model, and the rules that turn media into tokens.

    Attributes
    ----------
    text_config, vision_config
        Configurations of a stock Llama or Qwen2 model and of a stock SigLIP vision model.
    projector_type
        The `mm_projector_type` of the checkpoint.
    token_order
        Order of the projected tokens: "rows", "columns" or None, see `VilaProjector`.
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
        token_order: str | None = None,
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
        self.projector_type, self.token_order = projector_type, token_order
        self.select_layer = select_layer
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


def _part(config: Any, default: str) -> PretrainedConfig:
    """Build the configuration of a part from a dict; `default` is its type if the dict has none."""
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(config or {})
    return AutoConfig.for_model(config.pop("model_type", default), **config)


def read_root(folder: str | Path) -> dict[str, Any]:
    """Read the root config.json of a VILA folder.

    Raises
    ------
    CheckpointError
        If the folder or its config.json does not exist, the file is not valid JSON, the model type
        is not one of VILA, a sub-checkpoint is missing, or the variant is not supported
        (multi-scale vision, image start and end tokens).
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no config.json. Expected a local VILA folder: config.json beside llm/, "
            "vision_tower/ and mm_projector/."
        )
    try:
        root = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Copy the file again.") from error
    if root.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type={root.get('model_type')!r}; a VILA folder has one of "
            f"{', '.join(MODEL_TYPES)}."
        )
    for part, label in PARTS.items():
        if not (folder / part / "config.json").is_file():
            raise CheckpointError(
                f"{folder / part}: missing sub-checkpoint ({label}); no {part}/config.json. A VILA "
                f"folder needs {', '.join(f'{p}/' for p in PARTS)}."
            )
    for name, label in UNSUPPORTED.items():
        if root.get(name):
            raise CheckpointError(f"{path}: {name}=true; {label} are not supported.")
    feature = root.get("mm_vision_select_feature") or "cls_patch"
    if feature != "cls_patch":
        raise CheckpointError(
            f"{path}: mm_vision_select_feature={feature!r}; SigLIP has no class token to leave "
            "out, so 'cls_patch' (all patches) is expected."
        )
    return root


def read_config(folder: str | Path, tokenizer: Any, token_order: str | None = None) -> VilaConfig:
    """Build the configuration of a folder.

    Parameters
    ----------
    tokenizer
        Tokenizer of `llm/` with media tokens (see `tokens.load_tokenizer`). It is not used if the
        root config has "media_tokens", which is true for configurations that we wrote ourselves.
    token_order
        Order of the projected tokens, which overrides that of the projector type.

    Raises
    ------
    CheckpointError
        As `read_root`, and if the vision tower is not SigLIP or the image mode or a media encoder
        is not supported.
    """
    folder = Path(folder)
    root = read_root(folder)
    vision = AutoConfig.from_pretrained(folder / "vision_tower")
    vision = getattr(vision, "vision_config", vision)
    if vision.model_type != "siglip_vision_model":
        raise CheckpointError(
            f"{folder / 'vision_tower'}: model_type={vision.model_type!r}; only SigLIP vision "
            "towers (siglip_vision_model) are supported."
        )
    aspect = root.get("image_aspect_ratio") or "resize"
    if aspect not in ASPECTS:
        raise CheckpointError(
            f"{folder / 'config.json'}: image_aspect_ratio={aspect!r}; supported: "
            f"{', '.join(ASPECTS)}."
        )
    projector = json.loads((folder / "mm_projector" / "config.json").read_text(encoding="utf-8"))
    image, video = (_encoder(root, kind, folder) for kind in ("image", "video"))
    return VilaConfig(
        text_config=AutoConfig.from_pretrained(folder / "llm"),
        vision_config=vision,
        projector_type=str(projector.get("mm_projector_type")),
        token_order=token_order,
        select_layer=_int_option(root, "mm_vision_select_layer", -2),
        **(root.get("media_tokens") or _media_tokens(tokenizer, image, video)),
        video_pool=_pool(video, folder),
        num_video_frames=_int_option(root, "num_video_frames", 8),
        image_aspect_ratio=aspect,
        min_tiles=_int_option(root, "min_tiles", 1),
        max_tiles=_int_option(root, "max_tiles", 12),
        chat_template=root.get("chat_template"),
        root=root,
        architectures=root.get("architectures"),
    )


def _media_tokens(tokenizer: Any, image: dict[str, Any], video: dict[str, Any]) -> dict[str, Any]:
    """Return placeholder ids and end tokens, as the encoders' options and the tokenizer say."""
    from tokencomp.models.vila.tokens import end_ids, media_ids

    image_id, video_id = media_ids(tokenizer)
    return {
        "image_token_id": image_id,
        "video_token_id": video_id,
        "image_ends": end_ids(tokenizer, image),
        "video_ends": end_ids(tokenizer, video),
    }


def _int_option(root: dict[str, Any], name: str, default: int) -> int:
    """Return an integer of the root config, `default` if it is missing or null."""
    value = root.get(name)
    return default if value is None else int(value)


def _encoder(root: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """Return the options of a media encoder, which the root config stores as JSON text.

    Raises
    ------
    CheckpointError
        If the encoder's class is not supported.
    """
    spec = root.get(f"{kind}_encoder") or {}
    spec = json.loads(spec) if isinstance(spec, str) else dict(spec)
    target = str(spec.get("_target_", "")).rpartition(".")[2]
    allowed = ["BasicImageEncoder"] if kind == "image" else ["BasicVideoEncoder", "TSPVideoEncoder"]
    if target and target not in allowed:
        raise CheckpointError(
            f"{folder / 'config.json'}: {kind}_encoder {target!r} is not supported; known: "
            f"{', '.join(allowed)}."
        )
    return {"start_tokens": None, "end_tokens": "\n", **spec}


def _pool(video: dict[str, Any], folder: Path) -> tuple[int, int, int]:
    """Return the block (t, h, w) of video tokens that is averaged into one token."""
    sizes = video.get("pool_sizes") or [[1, 1, 1]]
    if len(sizes) != 1 or video.get("sep_tokens"):
        raise CheckpointError(
            f"{folder / 'config.json'}: video_encoder with pool_sizes={sizes} and separators; one "
            "pool size without sep_tokens is supported."
        )
    t, h, w = sizes[0]
    return int(t), int(h), int(w)
