"""How each tiny model is built. One family is one file; training code knows none by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tokencomp.errors import UnknownNameError

if TYPE_CHECKING:
    from recipes.tiny.families.parts import Family

FAMILIES = {
    "tiny-qwen2-vl": ".qwen2_vl",
    "tiny-qwen3-vl": ".qwen3_vl",
    "tiny-qwen3-vl-hard": ".qwen3_vl_hard",
    "tiny-qwen3-5": ".qwen3_5",
    "tiny-gemma3": ".gemma3",
    "tiny-llava-onevision": ".llava_onevision",
    "tiny-vila": ".vila",
}


def family(name: str) -> Family:
    """Load the family of a tiny model by name.

    Raises
    ------
    UnknownNameError
        For a name that has no builder.
    """
    if name not in FAMILIES:
        raise UnknownNameError(f"No tiny model {name!r} can be built. Choose one of {[*FAMILIES]}.")
    return importlib.import_module(FAMILIES[name], __name__).FAMILY
