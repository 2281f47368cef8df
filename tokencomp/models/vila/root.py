"""The root config of a VILA folder in the published layout, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tokencomp.errors import CheckpointError
from tokencomp.models.vila.config import VilaConfig
from tokencomp.models.vila.tokens import IMAGE, VIDEO, end_ids

# Values of the root config; None: missing. Others mean features that this package does not build:
# multi-scale vision, image start and end tokens, a class token, tiles of fixed shapes.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llava_llama", "vila"),
    "s2": (None, False),
    "dynamic_s2": (None, False),
    "mm_use_im_start_end": (None, False),
    "mm_vision_select_feature": (None, "cls_patch"),
    "image_aspect_ratio": (None, "resize", "pad", "dynamic"),
}
ENCODERS = {"image": ("BasicImageEncoder",), "video": ("BasicVideoEncoder", "TSPVideoEncoder")}
# Key of the root config → attribute of VilaConfig and its value if the key is missing.
ROOT_FIELDS: dict[str, tuple[str, Any]] = {
    "image_aspect_ratio": ("image_aspect_ratio", "resize"),
    "mm_vision_select_layer": ("select_layer", -2),
    "num_video_frames": ("num_video_frames", 8),
    "min_tiles": ("min_tiles", 1),
    "max_tiles": ("max_tiles", 12),
    "chat_template": ("chat_template", None),
}
MEDIA_TOKENS = ("image_token_id", "video_token_id", "image_ends", "video_ends")


def read_root(folder: str | Path) -> dict[str, Any]:
    """Read the root config.json of a VILA folder; raise `CheckpointError` if it is unsupported."""
    path = Path(folder) / "config.json"
    try:
        root = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Expected a local VILA folder: config.json next to "
            "llm/, vision_tower/ and mm_projector/."
        ) from error
    for name, values in SUPPORTED.items():
        _check(folder, name, root.get(name), values)
    return root


def _check(folder: str | Path, name: str, value: Any, supported: tuple[Any, ...]) -> None:
    """Refuse a value of a setting that is not supported."""
    if value not in supported:
        allowed = " or ".join(map(repr, supported))
        raise CheckpointError(f"{folder}: {name}={value!r} is not supported, only {allowed}.")


def read_config(folder: str | Path, tokenizer: Any) -> VilaConfig:
    """Build the configuration of a folder.

    The tokenizer of `llm/` with media tokens (see `tokens.load_tokenizer`) is not used if the root
    config has "media_tokens", which is true for configurations that we wrote ourselves.
    """
    folder = Path(folder)
    root = read_root(folder)
    vision = AutoConfig.from_pretrained(folder / "vision_tower")
    vision = getattr(vision, "vision_config", vision)
    _check(folder / "vision_tower", "model_type", vision.model_type, ("siglip_vision_model",))
    settings = {field: _stored(root, key) for key, (field, _) in ROOT_FIELDS.items()}
    projector = json.loads((folder / "mm_projector" / "config.json").read_text(encoding="utf-8"))
    image, video = (_encoder(root, kind, folder) for kind in ("image", "video"))
    media_tokens = root.get("media_tokens")
    if not media_tokens:
        ids = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
        ends = end_ids(tokenizer, image), end_ids(tokenizer, video)
        media_tokens = dict(zip(MEDIA_TOKENS, (*ids, *ends), strict=True))
    return VilaConfig(
        text_config=AutoConfig.from_pretrained(folder / "llm"),
        vision_config=vision,
        projector_type=str(projector.get("mm_projector_type")),
        **media_tokens,
        **settings,
        video_pool=_pool(video, folder),
        root=root,
        architectures=root.get("architectures"),
    )


def _stored(root: dict[str, Any], key: str) -> Any:
    """A setting of the root config, its usual value if it is missing or null."""
    value = root.get(key)
    return ROOT_FIELDS[key][1] if value is None else value


def _encoder(root: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """Return the options of a media encoder, which the root config stores as JSON text."""
    spec = root.get(f"{kind}_encoder") or {}
    spec = json.loads(spec) if isinstance(spec, str) else dict(spec)
    if target := str(spec.get("_target_", "")).rpartition(".")[2]:
        _check(folder, f"{kind}_encoder", target, ENCODERS[kind])
    return {"start_tokens": None, "end_tokens": "\n", **spec}


def _pool(video: dict[str, Any], folder: Path) -> tuple[int, int, int]:
    """Return the block (t, h, w) of video tokens that is averaged into one token."""
    sizes = video.get("pool_sizes") or [[1, 1, 1]]
    _check(folder, "number of pool_sizes", len(sizes), (1,))
    _check(folder, "sep_tokens", video.get("sep_tokens") or None, (None,))
    t, h, w = sizes[0]
    return int(t), int(h), int(w)


def root_of(config: Any) -> dict[str, Any]:
    """Return the root config: the one that was loaded with changed settings, or a new one."""
    root = config.root
    current = {name: getattr(config, field) for name, (field, _) in ROOT_FIELDS.items()}
    if root:
        changed = {name: v for name, v in current.items() if v != _stored(root, name)}
        return {**root, **changed}
    new_root: dict[str, Any] = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": config.model_type,
        "mm_vision_select_feature": "cls_patch",
        "mm_hidden_size": config.vision_config.hidden_size,
        "hidden_size": config.text_config.hidden_size,
        **current,
    }
    # With these ids in the config, the model loads without a tokenizer.
    new_root["media_tokens"] = {name: getattr(config, name) for name in MEDIA_TOKENS}
    if config.video_pool != (1, 1, 1):
        pool = {"_target_": "TSPVideoEncoder", "pool_sizes": [list(config.video_pool)]}
        new_root["video_encoder"] = json.dumps(pool)
    return new_root
