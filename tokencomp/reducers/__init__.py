"""One reducer per file; the contract is `tokencomp.reducers.base`, the names are `registry`."""

from tokencomp.reducers._batch import finite_features, finite_values, patch_rows, top_k
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import available_reducers, make_reducer, register_reducer
from tokencomp.reducers.score import ScoreReducer
from tokencomp.tokens.patches import Patches

__all__ = [
    "Patches",
    "Published",
    "Reducer",
    "ScoreReducer",
    "available_reducers",
    "finite_features",
    "finite_values",
    "make_reducer",
    "patch_rows",
    "register_reducer",
    "top_k",
]
