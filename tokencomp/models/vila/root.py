"""The root config of a VILA folder, as it is written."""

from __future__ import annotations

import json
from typing import Any

# Key of the root config → attribute of VilaConfig and its value if the key is missing.
ROOT_FIELDS: dict[str, tuple[str, Any]] = {
    "image_aspect_ratio": ("image_aspect_ratio", "resize"),
    "mm_vision_select_layer": ("select_layer", -2),
    "num_video_frames": ("num_video_frames", 8),
    "min_tiles": ("min_tiles", 1),
    "max_tiles": ("max_tiles", 12),
    "chat_template": ("chat_template", None),
}


def root_of(config: Any) -> dict[str, Any]:
    """Return the root config: the one that was loaded with changed settings, or a new one."""
    root = config.root
    current = {name: getattr(config, field) for name, (field, _) in ROOT_FIELDS.items()}
    if root:
        for name, (_, default) in ROOT_FIELDS.items():
            loaded = default if root.get(name) is None else root[name]
            if current[name] == loaded:
                del current[name]
        return {**root, **current}
    new_root: dict[str, Any] = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": config.model_type,
        "mm_vision_select_feature": "cls_patch",
        "mm_hidden_size": config.vision_config.hidden_size,
        "hidden_size": config.text_config.hidden_size,
        **current,
    }
    # With these ids in the config, the model loads without a tokenizer.
    names = ("image_token_id", "video_token_id", "image_ends", "video_ends")
    new_root["media_tokens"] = {name: getattr(config, name) for name in names}
    if config.video_pool != (1, 1, 1):
        pool = {"_target_": "TSPVideoEncoder", "pool_sizes": [list(config.video_pool)]}
        new_root["video_encoder"] = json.dumps(pool)
    return new_root
