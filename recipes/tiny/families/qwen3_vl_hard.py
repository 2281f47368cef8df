"""Tiny Qwen3-VL, trained further in hard scenes and on long clips; the same architecture."""

from __future__ import annotations

from typing import ClassVar

from recipes.tiny.families.qwen3_vl import TinyQwen3VL


class TinyQwen3VLHard(TinyQwen3VL):
    """See :class:`~recipes.tiny.families.Family`."""

    card: ClassVar[dict[str, str]] = {
        "note": "It starts at the weights of tiny-qwen3-vl; the cost counts its own steps alone. "
        "Its stages were trained one after the other, each from the weights of the one before, and "
        "validation accuracy after each decided what the next one needed. The command repeats the "
        "recipe, not these exact weights.",
        "trained_on": "images of 168 to 280 px a side; videos of 8, 12 and 16 frames, and of 32, "
        "48 and 64 frames of 112, 168 and 224 px",
    }


FAMILY = TinyQwen3VLHard()
