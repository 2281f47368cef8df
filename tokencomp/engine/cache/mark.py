"""A place in a conversation to which its KV cache can go back."""

from __future__ import annotations

import copy
from typing import Any

from tokencomp.engine.cache.frames import ATTRIBUTE
from tokencomp.engine.cache.layers import WHOLE
from tokencomp.engine.cache.rows import physical_length


class Mark:
    """What a cache holds now. Only rows may be added before `rewind`; none may be evicted.

    Layers that hold every row are cut to the rows that they had. All others (states of linear
    layers, windows that have moved on) cannot be cut, so a copy of them is kept: for a hybrid
    decoder a mark costs its states, not its rows.

    Parameters
    ----------
    cache
        A `DynamicCache`.
    """

    def __init__(self, cache: Any) -> None:
        self._cache, self._frames = cache, getattr(cache, ATTRIBUTE, None)
        self._layers = [
            _Rows(x) if type(x) in WHOLE and x.is_initialized else copy.deepcopy(x)
            for x in cache.layers
        ]

    def rewind(self) -> None:
        """Let the cache hold what it held; to be called once."""
        layers = self._cache.layers
        if hasattr(self._cache, ATTRIBUTE):
            setattr(self._cache, ATTRIBUTE, self._frames)
        del layers[len(self._layers) :]  # a cache without a config adds layers as they are written
        for i, saved in enumerate(self._layers):
            if isinstance(saved, _Rows):
                saved.restore(layers[i])
            else:
                layers[i] = saved


class _Rows:
    """The attributes of a layer but its tensors of rows, which would keep a second copy alive."""

    def __init__(self, layer: Any) -> None:
        self.kind, self.rows = type(layer), physical_length(layer)
        self.rest = {k: v for k, v in vars(layer).items() if k not in ("keys", "values")}

    def restore(self, layer: Any) -> None:
        """Cut `layer` to the rows it had, and give it the class and the attributes it had."""
        keys, values = (t[..., : self.rows, :] for t in (layer.keys, layer.values))
        layer.__class__ = self.kind
        vars(layer).clear()
        vars(layer).update(self.rest, keys=keys, values=values)
