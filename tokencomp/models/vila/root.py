"""The root config of a VILA folder in the published layout, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tokencomp.errors import CheckpointError
from tokencomp.models.vila.config import VilaConfig
from tokencomp.models.vila.tokens import IMAGE, VIDEO, end_ids

PARTS = {"llm": "the language model", "vision_tower": "SigLIP", "mm_projector": "the projector"}
UNSUPPORTED = {
    "s2": "multi-scale features",
    "dynamic_s2": "multi-scale features",
    "mm_use_im_start_end": "image start and end tokens",
}
ASPECTS = ("resize", "pad", "dynamic")
MODEL_TYPES = ("llava_llama", "vila")
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
            f"{folder}: no config.json. Expected a local VILA folder: config.json next to llm/, "
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


def read_config(folder: str | Path, tokenizer: Any) -> VilaConfig:
    """Build the configuration of a folder.

    The tokenizer of `llm/` with media tokens (see `tokens.load_tokenizer`) is not used if the root
    config has "media_tokens", which is true for configurations that we wrote ourselves.
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
    settings = {field: _stored(root, key) for key, (field, _) in ROOT_FIELDS.items()}
    if settings["image_aspect_ratio"] not in ASPECTS:
        raise CheckpointError(
            f"{folder / 'config.json'}: image_aspect_ratio={settings['image_aspect_ratio']!r}; "
            f"supported: {', '.join(ASPECTS)}."
        )
    projector = json.loads((folder / "mm_projector" / "config.json").read_text(encoding="utf-8"))
    image, video = (_encoder(root, kind, folder) for kind in ("image", "video"))
    return VilaConfig(
        text_config=AutoConfig.from_pretrained(folder / "llm"),
        vision_config=vision,
        projector_type=str(projector.get("mm_projector_type")),
        **(root.get("media_tokens") or _media_tokens(tokenizer, image, video)),
        **settings,
        video_pool=_pool(video, folder),
        root=root,
        architectures=root.get("architectures"),
    )


def _stored(root: dict[str, Any], key: str) -> Any:
    """A setting of the root config, its usual value if it is missing or null."""
    value = root.get(key)
    return ROOT_FIELDS[key][1] if value is None else value


def _media_tokens(tokenizer: Any, image: dict[str, Any], video: dict[str, Any]) -> dict[str, Any]:
    """Return placeholder ids and end tokens, as the encoders' options and the tokenizer say."""
    ids = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
    ends = end_ids(tokenizer, image), end_ids(tokenizer, video)
    return dict(zip(MEDIA_TOKENS, (*ids, *ends), strict=True))


def _encoder(root: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """Return the options of a media encoder, which the root config stores as JSON text."""
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
