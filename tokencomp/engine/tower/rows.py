"""The rows of a vision tower that a stage keeps: arguments of its blocks, and full length."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tokencomp.adapters.towers.base import Cells
from tokencomp.engine.tower.flops import TowerCost
from tokencomp.torchlib import compat
from tokencomp.torchlib.masks import backend_mask, block_mask, visible_columns


class TowerRows(ABC):
    """Kept rows of one call of a tower.

    Attributes
    ----------
    cells
        Cells of the call.
    index : Tensor of int64
        The rows, ascending: (rows,) of a packed tower, (pictures, rows) of a dense one.
    entered
        Whether the first block with fewer rows has begun.
    """

    def __init__(self, cells: Cells, index: Tensor) -> None:
        self.cells, self.index, self.entered = cells, index, False
        self._results: dict[int, tuple[Any, Any]] = {}

    @abstractmethod
    def arguments(self, hidden: Tensor, args: Any, kwargs: dict[str, Any], cost: TowerCost) -> Any:
        """Arguments of the next block for the kept rows."""

    @abstractmethod
    def full_length(self, x: Tensor) -> Tensor:
        """Scatter values of the kept rows to all rows; NaN where rows were dropped.

        Parameters
        ----------
        x : Tensor
            (1, rows, d) of a packed tower, (pictures, rows, d) of a dense one.
        """

    @abstractmethod
    def restored(self, out: Any) -> Any:
        """The output of a restoring module (`Tower.restorers`) at full length."""

    def _once(self, function: Callable[[Any], Any], tensor: Any) -> Any:
        """`function(tensor)`, cached: masks, bounds and tables are the same in all blocks.

        The tensor is stored too, so that its id is not reused.
        """
        if id(tensor) not in self._results:
            self._results[id(tensor)] = tensor, function(tensor)
        return self._results[id(tensor)][1]


class PackedRows(TowerRows):
    """Kept rows of a tower that takes the patches of all media as one packed sequence.

    Attributes
    ----------
    patches : Tensor of int64, shape (rows,)
        The kept patches, as indices of the tower's input.
    """

    def __init__(self, cells: Cells, index: Tensor, patches: Tensor) -> None:
        super().__init__(cells, index)
        self.patches = patches

    @classmethod
    def of(cls, cells: Cells, chosen: Tensor) -> PackedRows:
        """The rows of the cells `chosen`."""
        place = chosen if cells.order is None else cells.order.argsort()[chosen]
        place, unit = place.sort().values, cells.members.shape[1]
        index = place[:, None] * unit + torch.arange(unit, device=place.device)
        return cls(cells, index.flatten(), cells.members[chosen].flatten())

    def embedded(self, embed: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """Embeddings of all patches, computed only for kept ones; NaN for the others.

        `embed` takes pixels (patches, values), each patch independently.
        """
        x = embed(pixels[self.patches])
        return x.new_full((len(pixels), x.shape[-1]), math.nan).index_copy(0, self.patches, x)

    def arguments(self, hidden: Tensor, args: Any, kwargs: dict[str, Any], cost: TowerCost) -> Any:
        kwargs, bounds = dict(kwargs), kwargs["cu_seqlens"]
        if not self.entered:
            hidden, self.entered = hidden[self.index], True
        kwargs["cu_seqlens"], longest = self._once(self.bounds, bounds)
        cost.block(bounds, kwargs["cu_seqlens"])
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = longest
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = tuple(self._once(self._table, t) for t in tables)
        return _with_hidden(hidden, args, kwargs)

    def full_length(self, x: Tensor) -> Tensor:
        full = x.new_full((1, len(self.cells.pixels), x.shape[-1]), math.nan)
        return full.index_copy(1, self.index, x)

    def restored(self, out: Tensor) -> Tensor:
        full = out.new_full((len(self.cells.members), out.shape[-1]), math.nan)
        unit = self.cells.members.shape[1]
        return full.index_copy(0, self.index[::unit] // unit, out)

    def _table(self, table: Tensor) -> Tensor:
        return table[self.index]

    def bounds(self, bounds: Tensor) -> tuple[Tensor, int]:
        """Bounds of the sequences after dropping, without empty ones, and the longest length."""
        before = torch.searchsorted(self.index, bounds.to(self.index))
        left = torch.unique_consecutive(before).to(bounds.dtype)
        return left, int(left.diff().max())


class DenseRows(TowerRows):
    """Kept rows of a tower that takes a batch of pictures of equal size.

    Attributes
    ----------
    unread : Tensor of bool, shape (pictures, rows)
        Padding rows that equalise lengths within the batch; no token reads them.
    lengths : Tensor of int64, shape (pictures,), or None
        If the pixels decide how many rows are kept: the number before the padding rows, to which
        no row attends. None: rows attend to all rows.
    """

    def __init__(
        self, cells: Cells, index: Tensor, unread: Tensor, lengths: Tensor | None = None
    ) -> None:
        super().__init__(cells, index)
        self.unread, self.lengths = unread, lengths
        self._patches = len(cells.pixels) // cells.pictures  # per picture

    @classmethod
    def of(cls, cells: Cells, chosen: Tensor) -> DenseRows:
        """The rows of the cells `chosen`, without the class token.

        No device read, unless the pixels have decided how many are kept.
        """
        total = len(cells.pixels)
        # Member -1 (no patch) marks the additional last entry.
        read = torch.zeros(total + 1, dtype=torch.bool, device=chosen.device)
        read[cells.members[chosen].flatten()] = True
        read = read[:total].view(-1, total // cells.pictures)
        # Patches of kept cells first, then padding rows up to the common length.
        index = (~read).to(torch.uint8).argsort(dim=1, stable=True)
        if cells.rows:
            index = index[:, : cells.rows].sort(1).values
            return cls(cells, index, ~read.gather(1, index))
        lengths = read.sum(1)
        shortest, rows = (int(n) for n in lengths.aminmax())
        index, ragged = index[:, :rows], shortest < rows
        cells = replace(cells, rows=rows)
        return cls(cells, index, ~read.gather(1, index), lengths if ragged else None)

    @property
    def _head(self) -> int:
        """Number of class tokens before the patches of a picture, 0 or 1."""
        return self.index.shape[1] - self.cells.rows

    def arguments(self, hidden: Tensor, args: Any, kwargs: dict[str, Any], cost: TowerCost) -> Any:
        kwargs, args = dict(kwargs), list(args)
        if not self.entered:
            hidden = self._enter(hidden)
        before = equal_bounds(self.cells.pictures, self._head + self._patches)
        cost.block(before, equal_bounds(*self.index.shape))
        if isinstance(kwargs.get("attention_mask"), Tensor | BlockMask):
            kwargs["attention_mask"] = self._once(self._mask, kwargs["attention_mask"])
        elif len(args) > 1 and isinstance(args[1], Tensor | BlockMask):
            args[1] = self._once(self._mask, args[1])
        return _with_hidden(hidden, tuple(args), kwargs)

    def _enter(self, hidden: Tensor) -> Tensor:
        """Gather the input of the first block with fewer rows."""
        first = hidden.shape[1] - self._patches
        if first:  # keep the class token
            head = torch.arange(first, device=self.index.device).expand(len(self.index), -1)
            self.index = torch.cat([head, self.index + first], 1)
            self.unread = torch.cat([torch.zeros_like(head, dtype=torch.bool), self.unread], 1)
            self.lengths = None if self.lengths is None else self.lengths + first
        self.entered = True
        return hidden.gather(1, self.index[..., None].expand(-1, -1, hidden.shape[-1]))

    def padding_mask(self, config: Any, hidden: Tensor) -> Any:
        """The mask that hides padding rows, in the form of the tower's attention backend."""
        return self._once(functools.partial(self._padding_mask, config, hidden), self.lengths)

    def _padding_mask(self, config: Any, hidden: Tensor, lengths: Tensor) -> Any:
        rows = hidden.shape[1]
        real = torch.arange(rows, device=hidden.device) < lengths[:, None]
        if "flash" in compat.attention_implementation(config):
            return real
        return backend_mask(config, real[:, None, None].expand(-1, 1, rows, -1), hidden)

    def _mask(self, mask: Any) -> Any:
        """A mask (pictures, 1, rows, rows) or (pictures, rows) for the kept rows."""
        if isinstance(mask, BlockMask):
            return block_mask(self._mask(visible_columns(mask)))
        index = self.index
        if mask.ndim == 2:
            return mask.gather(1, index)
        columns = index[:, None, None].expand(-1, *mask.shape[1:3], -1)
        mask = mask.expand(len(index), -1, -1, -1).gather(3, columns)
        if mask.shape[2] == 1:
            return mask
        return mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))

    def full_length(self, x: Tensor) -> Tensor:
        """See `TowerRows`; padding rows are NaN as well.

        The first row is the class token, if there is one; the input of a projector may lack it.
        """
        index, unread, head = self.index, self.unread, self._head
        if (
            x.ndim != 3
            or len(x) != len(index)
            or not index.shape[1] >= x.shape[1] >= self.cells.rows
        ):
            return x
        if x.shape[1] == self.cells.rows:  # without class token
            index, unread, head = index[:, head:] - head, unread[:, head:], 0
        x = x.masked_fill(unread[..., None], math.nan)
        full = x.new_full((len(x), head + self._patches, x.shape[-1]), math.nan)
        return full.scatter(1, index[..., None].expand(-1, -1, x.shape[-1]), x)

    def restored(self, out: Any) -> Any:
        if isinstance(out, Tensor):
            return self.full_length(out)
        for name in ("last_hidden_state", "hidden_states"):
            states = getattr(out, name, None)
            if isinstance(states, Tensor):
                setattr(out, name, self.full_length(states))
            elif states is not None:
                states = tuple(s if s is None else self.full_length(s) for s in states)
                setattr(out, name, states)
        return out


def rows_of(cells: Cells, chosen: Tensor) -> TowerRows:
    return DenseRows.of(cells, chosen) if cells.pictures else PackedRows.of(cells, chosen)


def equal_bounds(count: int, length: int) -> Tensor:
    return torch.arange(count + 1) * length


def _with_hidden(hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    if args:
        return (hidden, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": hidden}
