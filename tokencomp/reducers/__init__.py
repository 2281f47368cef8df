"""One reducer per file; see `tokencomp.reducers.base` for the contract."""

from tokencomp.reducers.base import Reducer, available_reducers, make_reducer, register_reducer

__all__ = ["Reducer", "available_reducers", "make_reducer", "register_reducer"]
