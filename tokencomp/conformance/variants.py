"""What is set in the config of a tiny model beside its sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Fields that are set before a model is created.

    Attributes
    ----------
    name
        What this form has; "" where a type has one form.
    text, top
        Fields of the text config, and of the config of the whole model (with dots: inside of it).
    text_type
        Model type of the text config, where the default one of some releases is of another; "":
        the default one.
    image_tokens
        Tokens of an image to try: 3 × 4 (or no grid), or as many with a line break per row.
    newlines
        Which of them are `body.image_newline`.
    """

    name: str = ""
    text: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    text_type: str = ""
    image_tokens: tuple[int, ...] = (12, 15)
    newlines: tuple[int, ...] = ()


PLAIN = Variant()
# Families whose images are tiles of one size: 4 × 4 tokens. The base tile of LLaVA-NeXT is
# followed by a mosaic, here 4 × 4 with a line break behind each row.
_TILES = {"vision_config.image_size": 56, "vision_config.patch_size": 14}
_TILE = Variant(top=_TILES, image_tokens=(16,))
_MOSAIC = Variant(top=_TILES, image_tokens=(36,), newlines=(20, 25, 30, 35))
OF_CHECKPOINTS: dict[str, Variant] = {
    "llava": _TILE,
    "internvl": Variant(
        top={"vision_config.image_size": [112, 112], "vision_config.patch_size": [14, 14]},
        image_tokens=(16,),
    ),
    "llava_next": _MOSAIC,
    "llava_next_video": _MOSAIC,
    "llava_onevision": _MOSAIC,
    **dict.fromkeys(("smolvlm", "idefics3"), Variant(image_tokens=(9,))),
    # Without the talker, which reads what the thinker has written.
    "qwen2_5_omni": Variant(top={"enable_audio_output": False}),
    "qwen3_omni_moe": Variant(top={"enable_audio_output": False}),
}
"""What a tiny model with the config of a checkpoint needs, by model type."""
