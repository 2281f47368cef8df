"""One reducer per file; the contract is `tokencomp.reducers.base`, the names are `registry`."""

from tokencomp.plan.options import Traits
from tokencomp.reducers._batch import means, segment, spread
from tokencomp.reducers.base import Reducer, ScoreReducer, best_rows, finite_features, finite_values
from tokencomp.reducers.published import Published
from tokencomp.reducers.registry import available_reducers, make_reducer, register_reducer
from tokencomp.tokens.tokens import Kept, Tokens

__all__ = [
    "Kept",
    "Published",
    "Reducer",
    "ScoreReducer",
    "Tokens",
    "Traits",
    "available_reducers",
    "best_rows",
    "finite_features",
    "finite_values",
    "make_reducer",
    "means",
    "register_reducer",
    "segment",
    "spread",
]
