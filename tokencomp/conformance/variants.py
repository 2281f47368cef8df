"""Config fields of a tiny model that are set in addition to its sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Fields that are set before a model is created.

    `text_type` is the model type of the text config, where the default one of some releases is of
    another; "": the default one. `image_tokens` are numbers of tokens of an image to try: 3 × 4 (or
    no grid), or as many with a line break per row.
    """

    name: str = ""  # what this form has; "" where a type has one form
    text: dict[str, Any] = field(default_factory=dict)  # fields of the text config
    top: dict[str, Any] = field(default_factory=dict)  # of the whole config; with dots: inside
    text_type: str = ""
    image_tokens: tuple[int, ...] = (12, 15)
    newlines: tuple[int, ...] = ()  # numbers of the image tokens that are `body.image_newline`


PLAIN = Variant()
# Families whose images are tiles of one size: 4 × 4 tokens. The base tile of LLaVA-NeXT is
# followed by a mosaic, here 4 × 4 with a line break after each row.
_TILES = {"vision_config.image_size": 56, "vision_config.patch_size": 14}
_TILE = Variant(top=_TILES, image_tokens=(16,))
_MOSAIC = Variant(top=_TILES, image_tokens=(36,), newlines=(20, 25, 30, 35))
_OMNI = {"vision_start_token_id": 507, "vision_end_token_id": 508, "audio_start_token_id": 509}
WITHOUT_TEXT: dict[str, Variant] = {
    "llava": _TILE,
    "internvl": Variant(
        top={"vision_config.image_size": [112, 112], "vision_config.patch_size": [14, 14]},
        image_tokens=(16,),
    ),
    **dict.fromkeys(
        ("vila", "llava_llama"),
        Variant(
            top={**_TILES, "projector_type": "mlp_downsample", "image_ends": [[], []]},
            image_tokens=(4,),
        ),
    ),
    "llava_next": _MOSAIC,
    "llava_next_video": _MOSAIC,
    "llava_onevision": _MOSAIC,
    **dict.fromkeys(("smolvlm", "idefics3"), Variant(image_tokens=(9,))),
    # Classes with dictionaries of image codes that a checkpoint brings.
    "chameleon": Variant(top={"vocabulary_map": {"<image>": 505}, "image_token_id": 505}),
    "emu3": Variant(
        top={"vocabulary_map": {"<image>": 505, "<|extra_200|>": 506}, "image_token_id": 505}
    ),
    "instructblip": Variant(text_type="llama"),
    "granite4_vision": Variant(
        top={"deepstack_layer_map": [(-1, 0), (-2, 2)], "downsample_rate": "4/8"},
        text_type="granite4_vision_text",
    ),
    "perception_lm": Variant(top={"vision_config.model_args": {"embed_dim": 64}}),
    "qwen2_5_omni_thinker": Variant(top=_OMNI),
    "qwen3_omni_moe_thinker": Variant(top=_OMNI),
    # Without the talker, which reads what the thinker has written.
    **dict.fromkeys(
        ("qwen2_5_omni", "qwen3_omni_moe"),
        Variant(
            top={
                "enable_audio_output": False,
                **{f"thinker_config.{name}": value for name, value in _OMNI.items()},
            }
        ),
    ),
}
"""What is set by model type, also in the config of a checkpoint: nothing of its text config."""
