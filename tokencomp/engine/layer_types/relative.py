"""Attention biases by the distance of two tokens, which transformers counts in rows (Inkling).

Behind dropped tokens rows lie closer together than the tokens stood. Here the bias of a compressed
call is computed from the columns of the uncompressed sequence, so that no distance changes. Under
compact positions rows count, as they do for other models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.structure import parameters_of
from tokencomp.errors import RowIndexedAttentionError
from tokencomp.torchlib import compat
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.replace import MethodReplacement

DISTANCE = "relative_distance"  # argument of decoder layers, int64 (queries, keys)
POSITIONS = ("query_positions", "key_positions")  # of the module of a bias, int64 (n,)


class RelativePositions(Hooked):
    """Hooks where the decoder hands distances to a layer, or positions to the module of its bias.

    Parameters
    ----------
    calls
        The forward pass of every thread (`RunningCalls`).

    Raises
    ------
    RowIndexedAttentionError
        A layer of the decoder has such a bias, and takes neither of the two.
    """

    def __init__(self, adapter: Adapter, calls: Any) -> None:
        self.calls = calls
        self._layers: dict[int, nn.Module] = {}
        self._biases: list[tuple[int, nn.Module]] = []
        extent = getattr(adapter.decoder.config, "rel_extent", None)
        if not isinstance(extent, int):
            return
        for i, layer in enumerate(adapter.layers):
            biases = [m for m in layer.modules() if set(POSITIONS) <= set(parameters_of(m))]
            if DISTANCE in parameters_of(layer):
                self._layers[i] = layer
            elif biases:
                self._biases += [(i, module) for module in biases]
            else:
                raise RowIndexedAttentionError(
                    f"{type(layer).__name__}: attention adds a bias by the number of rows between "
                    f"two tokens, up to {extent} (rel_extent of its config), in a way that is not "
                    "known, so that dropping a token would not equal masking it. Run it without "
                    "patch()."
                )

    def install(self) -> None:
        """Hook the layers, or the modules of their biases."""
        for i, layer in self._layers.items():
            hook = functools.partial(self._layer, i)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for i, module in self._biases:
            bias = functools.partial(self._bias, i)
            self._handles.append(MethodReplacement(module, "forward", bias))

    @compat.not_compiled
    def _columns(self, layer: int, batch: int, device: torch.device) -> Tensor | None:
        """Columns of all rows that layer `layer` has seen, (B, rows); None if rows are right."""
        forward = self.calls.state.forward
        if forward is None or not forward.by_column:
            return None
        columns: Tensor | None = forward.segment_of(layer).columns(batch, device)
        return columns

    def _layer(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = compat.bind(module, args, kwargs)
        hidden, distance = kwargs["hidden_states"], kwargs[DISTANCE]
        columns = self._columns(i, hidden.shape[0], hidden.device)
        if columns is None:
            return None
        queries, keys = columns[:, -distance.shape[0] :], columns[:, -distance.shape[1] :]
        return (), {**kwargs, DISTANCE: (queries[:, :, None] - keys[:, None])[:, None]}

    def _bias(
        self,
        i: int,
        original: Callable[..., Tensor],
        states: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
    ) -> Tensor:
        columns = self._columns(i, states.shape[0], states.device)
        if columns is None:
            return original(states, query_positions, key_positions)
        queries, keys = (columns[:, -len(p) :] for p in (query_positions, key_positions))
        samples = zip(states.split(1), queries, keys, strict=True)
        return torch.cat([original(*sample) for sample in samples])
