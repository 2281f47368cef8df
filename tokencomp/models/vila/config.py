"""Configuration of VILA and NVILA, read from and written to the published folder layout."""

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
    """Parts of a VILA model, and how media become tokens.

    Attributes
    ----------
    text_config, vision_config
        Stock Llama or Qwen2, and stock SigLIP vision configurations.
    projector_type
        `mm_projector_type` of the checkpoint.
    token_order
        "rows", "columns" or None: see `VilaProjector`.
    select_layer
        Entry of the tower's hidden states that is projected.
    image_token_id, video_token_id
        Placeholders; they need not be in the embedding table.
    image_ends, video_ends
        Token ids before and after every image, and every frame of a video: ([], [newline]).
    video_pool
        (t, h, w) block of projected video tokens that is averaged into one.
    num_video_frames
        Frames taken from a video.
    image_aspect_ratio
        "resize" squeezes an image into the tower's square, "pad" adds borders, "dynamic" cuts the
        only image of a conversation into `min_tiles … max_tiles` tiles and adds a thumbnail.
    chat_template
        Name of a conversation format for tokenizers without one of their own.
    root
        The checkpoint's own config.json, kept so that saving writes back what was read.
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
        image_ends: tuple[list[int], list[int]] = ((), ()),  # type: ignore[assignment]
        video_ends: tuple[list[int], list[int]] = ((), ()),  # type: ignore[assignment]
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
        return self.vision_config.image_size // self.vision_config.patch_size


def _part(config: Any, default: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    config = dict(config or {})
    return AutoConfig.for_model(config.pop("model_type", default), **config)


def read_root(folder: str | Path) -> dict[str, Any]:
    """The root config.json of a VILA folder.

    Raises
    ------
    CheckpointError
        No folder, no or broken config.json, another model type, a missing sub-checkpoint, or a
        variant that is not supported (multi-scale vision).
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
    for part, what in PARTS.items():
        if not (folder / part / "config.json").is_file():
            raise CheckpointError(
                f"{folder / part}: missing sub-checkpoint ({what}); no {part}/config.json. A VILA "
                f"folder needs {', '.join(f'{p}/' for p in PARTS)}."
            )
    for name, what in UNSUPPORTED.items():
        if root.get(name):
            raise CheckpointError(f"{path}: {name}=true; {what} are not supported.")
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
        Tokenizer of `llm/`, media tokens included (see `vila_tokens.load_tokenizer`). Not read
        if the root config has "media_tokens", as configs made from scratch do.

    Raises
    ------
    CheckpointError
        As `read_root`; also a vision tower that is not SigLIP, an image mode or video encoder
        that is not supported.
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
        select_layer=_given(root, "mm_vision_select_layer", -2),
        **(root.get("media_tokens") or _media_tokens(tokenizer, image, video)),
        video_pool=_pool(video, folder),
        num_video_frames=_given(root, "num_video_frames", 8),
        image_aspect_ratio=aspect,
        min_tiles=_given(root, "min_tiles", 1),
        max_tiles=_given(root, "max_tiles", 12),
        chat_template=root.get("chat_template"),
        root=root,
        architectures=root.get("architectures"),
    )


def _media_tokens(tokenizer: Any, image: dict[str, Any], video: dict[str, Any]) -> dict[str, Any]:
    from tokencomp.models.vila.tokens import end_ids, media_ids

    image_id, video_id = media_ids(tokenizer)
    return {
        "image_token_id": image_id,
        "video_token_id": video_id,
        "image_ends": end_ids(tokenizer, image),
        "video_ends": end_ids(tokenizer, video),
    }


def _given(root: dict[str, Any], name: str, default: int) -> int:
    value = root.get(name)
    return default if value is None else int(value)


def _encoder(root: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """Options of a media encoder; the root config holds them as JSON text."""
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
    sizes = video.get("pool_sizes") or [[1, 1, 1]]
    if len(sizes) != 1 or video.get("sep_tokens"):
        raise CheckpointError(
            f"{folder / 'config.json'}: video_encoder with pool_sizes={sizes} and separators; one "
            "pool size without sep_tokens is supported."
        )
    t, h, w = sizes[0]
    return int(t), int(h), int(w)
