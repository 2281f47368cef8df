"""All kinds of decoder layers, by the names that transformers' configs give them."""

from __future__ import annotations

from collections.abc import Iterable

from tokencomp.engine.cache.rows import REFERENCE
from tokencomp.engine.kinds.base import LayerKind
from tokencomp.engine.kinds.chunked import Chunked
from tokencomp.engine.kinds.indexed import Indexed
from tokencomp.engine.kinds.reference import Reference
from tokencomp.engine.kinds.sliding import Sliding
from tokencomp.engine.kinds.without import Mixing, State

FULL = LayerKind("full_attention")
SLIDING = Sliding("sliding_attention")
CONVOLUTION = State("linear_attention")  # under whose name decoders take the mask of convolutions
ROWS = (
    FULL,
    SLIDING,
    CONVOLUTION,
    Chunked("chunked_attention"),
    Indexed("indexed_attention"),
    Reference(REFERENCE),
    State("conv"),
    Mixing("moe"),
    Mixing("mlp"),
)
# Attention whose keys and values run through short convolutions: what its masks are those of.
CONVOLVING = {"hybrid": FULL, "hybrid_sliding": SLIDING}
KINDS: dict[str, LayerKind] = {**{kind.name: kind for kind in ROWS}, **CONVOLVING}


def unknown_kinds(names: Iterable[str]) -> list[str]:
    """Names that no kind has, sorted."""
    return sorted(set(names) - set(KINDS))
