"""Retrieval models that embed every token of a page: ColPali, ColQwen2."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from tokencomp.adapters.registry import register_adapter
from tokencomp.adapters.structural import StructuralAdapter
from tokencomp.adapters.structure import Parts, find_parts


@register_adapter
class ColPaliAdapter(StructuralAdapter):
    """ColPali passes pixels to the body of PaliGemma."""

    family = "ColPali"
    model_types: ClassVar[tuple[str, ...]] = ("colpali",)

    def find_parts(self, model: nn.Module) -> Parts:
        return find_parts(model.vlm)


@register_adapter
class ColQwen2Adapter(StructuralAdapter):
    """ColQwen2 inserts features itself and calls the body of Qwen2-VL with embeddings only.

    Grids of images come from its arguments, because all positions are those of text.
    """

    family = "ColQwen2"
    model_types = ("colqwen2",)

    def find_parts(self, model: nn.Module) -> Parts:
        inner = find_parts(model.vlm)
        return Parts(inner.top, model, inner.decoder)
