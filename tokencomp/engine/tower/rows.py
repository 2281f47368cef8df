"""The rows of a vision tower that a stage keeps: arguments of blocks, full length, and FLOPs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from tokencomp.adapters.towers.base import Cells, Tower, attention_blocks
from tokencomp.torchlib import compat
from tokencomp.torchlib.masks import backend_mask, block_mask, visible_columns


class TowerRows(ABC):
    """Kept rows of one call of a tower.

    `index` has the rows, int64: (rows,) of a packed tower, ascending; (pictures, rows) of a dense
    one. `lengths` (pictures,) is for a dense tower, if the pixels decide how many rows are kept:
    the number before the padding rows, to which no row attends. None: rows attend to all rows.
    """

    lengths: Tensor | None = None

    def __init__(self, cells: Cells, index: Tensor) -> None:
        self.cells, self.index, self.entered = cells, index, False
        self._results: dict[int, tuple[Any, Any]] = {}

    @abstractmethod
    def arguments(self, hidden: Tensor, rest: Any, kwargs: dict[str, Any], cost: TowerCost) -> Any:
        """Arguments of the next block for the kept rows; those by place are `hidden` and `rest`."""

    @abstractmethod
    def full_length(self, x: Tensor) -> Tensor:
        """Scatter values of the kept rows to all rows; NaN where rows were dropped.

        x is (1, rows, d) of a packed tower, (pictures, rows, d) of a dense one.
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
    """Kept rows of a tower that takes the patches of all media as one packed sequence."""

    @classmethod
    def of(cls, cells: Cells, chosen: Tensor) -> PackedRows:
        """The rows of the cells `chosen`."""
        place = chosen if cells.order is None else cells.order.argsort()[chosen]
        # A packed tower stores the patches of a cell next to each other, in its order of cells.
        place, unit = place.sort().values, cells.members.shape[1]
        index = place[:, None] * unit + torch.arange(unit, device=place.device)
        return cls(cells, index.flatten())

    def embedded(self, embed: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """Embeddings of all patches, computed only for kept ones; NaN for the others.

        `embed` takes pixels (patches, values), each patch independently.
        """
        cells, order = self._places(), self.cells.order
        patches = self.cells.members[cells if order is None else order[cells]].flatten()
        x = embed(pixels[patches])
        return x.new_full((len(pixels), x.shape[-1]), math.nan).index_copy(0, patches, x)

    def arguments(self, hidden: Tensor, rest: Any, kwargs: dict[str, Any], cost: TowerCost) -> Any:
        bounds = kwargs["cu_seqlens"]
        if not self.entered:
            hidden, self.entered = hidden[self.index], True
        kwargs["cu_seqlens"], longest = self._once(self.bounds, bounds)
        cost.bounds.append((bounds, kwargs["cu_seqlens"]))
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = longest
        if (tables := kwargs.get("position_embeddings")) is not None:
            kept = (self._once(lambda table: table[self.index], table) for table in tables)
            kwargs["position_embeddings"] = tuple(kept)
        return (hidden, *rest), kwargs

    def full_length(self, x: Tensor) -> Tensor:
        full = x.new_full((1, len(self.cells.pixels), x.shape[-1]), math.nan)
        return full.index_copy(1, self.index, x)

    def restored(self, out: Tensor) -> Tensor:
        full = out.new_full((len(self.cells.members), out.shape[-1]), math.nan)
        return full.index_copy(0, self._places(), out)

    def _places(self) -> Tensor:
        """Positions of the kept cells in the sequence, see `Cells.order`."""
        unit = self.cells.members.shape[1]
        return self.index[::unit] // unit

    def bounds(self, bounds: Tensor) -> tuple[Tensor, int]:
        """Bounds of the sequences after dropping, without empty ones, and the longest length."""
        # Bounds 0 4 8 12 and kept rows 0 1 8 9: 0 2 2 4, without the empty sequence 0 2 4.
        before = torch.searchsorted(self.index, bounds.to(self.index))
        left = torch.unique_consecutive(before).to(bounds.dtype)
        return left, int(left.diff().max())


class DenseRows(TowerRows):
    """Kept rows of a tower that takes a batch of pictures of equal size.

    `counts` (pictures,) are rows before the padding rows, which no token reads.
    """

    def __init__(self, cells: Cells, index: Tensor, counts: Tensor) -> None:
        super().__init__(cells, index)
        self.counts = counts
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
        index, counts = (~read).to(torch.uint8).argsort(dim=1, stable=True), read.sum(1)
        if cells.rows:
            return cls(cells, index[:, : cells.rows], counts)
        # The pixels decide: one device read for the length that all pictures are padded to.
        shortest, longest = (int(n) for n in counts.aminmax())
        rows = cls(replace(cells, rows=longest), index[:, :longest], counts)
        rows.lengths = counts if shortest < longest else None
        return rows

    @property
    def _head(self) -> int:
        """Number of class tokens before the patches of a picture, 0 or 1."""
        return self.index.shape[1] - self.cells.rows

    def arguments(self, hidden: Tensor, rest: Any, kwargs: dict[str, Any], cost: TowerCost) -> Any:
        if not self.entered:
            hidden = self._enter(hidden)
        before = equal_bounds(self.cells.pictures, self._head + self._patches)
        cost.bounds.append((before, equal_bounds(*self.index.shape)))
        # The only other tensors are masks.
        rest = tuple(self._once(self._mask, value) for value in rest)
        return (hidden, *rest), {n: self._once(self._mask, v) for n, v in kwargs.items()}

    def _enter(self, hidden: Tensor) -> Tensor:
        """Gather the input of the first block with fewer rows."""
        first = hidden.shape[1] - self._patches  # 1: every picture keeps its class token, row 0
        self.index = nn.functional.pad(self.index + first, (first, 0))
        self.counts = self.counts + first
        self.lengths = None if self.lengths is None else self.lengths + first
        self.entered = True
        return hidden.take_along_dim(self.index[..., None], 1)

    def padding_mask(self, config: Any, hidden: Tensor) -> Any:
        """The mask that hides padding rows, in the form of the tower's attention backend."""

        def mask(lengths: Tensor) -> Any:
            rows = hidden.shape[1]
            real = torch.arange(rows, device=hidden.device) < lengths[:, None]
            if "flash" in compat.attention_implementation(config):
                return real
            return backend_mask(config, real[:, None, None].expand(-1, 1, rows, -1), hidden)

        return self._once(mask, self.lengths)

    def _mask(self, mask: Any) -> Any:
        """A mask (pictures, 1, rows, rows) or (pictures, rows) for the kept rows."""
        if isinstance(mask, BlockMask):
            return block_mask(self._mask(visible_columns(mask)))
        if not isinstance(mask, Tensor):
            return mask
        # Keys first, then queries, unless one row of the mask is for all queries.
        mask = mask.take_along_dim(self.index if mask.ndim == 2 else self.index[:, None, None], -1)
        if mask.ndim == 2 or mask.shape[2] == 1:
            return mask
        return mask.take_along_dim(self.index[:, None, :, None], 2)

    def full_length(self, x: Tensor) -> Tensor:
        """See `TowerRows`; padding rows are NaN as well.

        The first row is the class token, if there is one; the input of a projector may lack it.
        """
        rows = self.cells.rows
        # Another output of the module (pooled, or of another batch) passes unchanged.
        if x.ndim != 3 or len(x) != len(self.index) or x.shape[1] not in (rows, rows + self._head):
            return x
        head = x.shape[1] - rows
        # 1 if the class token was removed before this module, as LLaVA does.
        lacks = self._head - head
        index, counts = self.index[:, lacks:] - lacks, self.counts - lacks
        unread = torch.arange(x.shape[1], device=x.device) >= counts[:, None]
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


def kept_rows(cells: Cells, chosen: Tensor) -> TowerRows:
    return DenseRows.of(cells, chosen) if cells.pictures else PackedRows.of(cells, chosen)


def equal_bounds(count: int, length: int) -> Tensor:
    return torch.arange(count + 1) * length


# -- FLOPs ---------------------------------------------------------------------------------------


@dataclass
class TowerCost:
    """Work of one call of a vision tower; all pairs are without and with the stage.

    A multiplication and an addition are two FLOPs. Patch embedding, norms and activations are not
    counted.
    """

    row: int  # FLOPs of the linear layers of one block, per row
    width: int  # channels of all heads together
    unused: int  # number of blocks after those in use
    token: int  # FLOPs of the projectors, per row of their input
    # Sequence bounds of every block that has run: pairs of integer tensors.
    bounds: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tokens: tuple[int, int] = (0, 0)  # rows that enter the projectors

    @classmethod
    def of(cls, layout: Tower) -> TowerCost:
        """Of a tower before a call."""
        block = layout.blocks[0]
        attn: Any = attention_blocks(block)[0]
        token = sum(_linear(module) for module in layout.projectors)
        return cls(_linear(block), attn.num_heads * attn.head_dim, len(layout.unused), token)

    @property
    def patches(self) -> tuple[int, int]:
        """Rows summed over the blocks in use."""
        before, after = (sum(int(pair[i][-1]) for pair in self.bounds) for i in (0, 1))
        return before, after

    @property
    def tower_flops(self) -> tuple[int, int]:
        """FLOPs of all blocks without the stage, and of the blocks in use with it."""
        before, after = ([self._block(pair[i]) for pair in self.bounds] for i in (0, 1))
        return sum(before) + self.unused * sum(before[-1:]), sum(after)

    @property
    def projector_flops(self) -> tuple[int, int]:
        before, after = self.tokens
        return self.token * before, self.token * after

    def _block(self, bounds: Tensor) -> int:
        # Attention without a mask inside of every sequence: all pairs of its rows.
        squares = int(bounds.long().diff().square().sum())
        return self.row * int(bounds[-1]) + 4 * self.width * squares


def _linear(module: nn.Module) -> int:
    """FLOPs per row of all linear layers in `module`, in any form of weights."""
    products = 0
    for part in module.modules():
        sizes: list[Any] = [getattr(part, name, None) for name in ("in_features", "out_features")]
        inner = (m for m in part.modules() if m is not part)
        if None in sizes or any(hasattr(m, "in_features") for m in inner):  # a wrapper (LoRA)
            products += sum(p.numel() for p in part.parameters(recurse=False) if p.ndim == 2)
        else:
            products += int(math.prod(sizes))
    return 2 * products
