"""The stage in the vision tower: patches leave before a block, and their tokens come back as NaN.

The tower sees fewer patches from block k on. Behind the module that turns patches into tokens (or
behind the tower, where that module needs the whole picture) rows stand at their full length again,
because the model fills placeholders by number. Rows that left are NaN, "not computed": NaN passes
through every later resampling, marks exactly the tokens that read a patch that left, needs no table
beside the features, and makes the output NaN if something bypasses the entry of the decoder, where
these tokens leave (`tokencomp.engine.forward`).
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.instance_method import MethodReplacement
from tokencomp.adapters.towers import Cells, DenseTower, EncoderCall, Tower
from tokencomp.engine import compat
from tokencomp.engine.tower_flops import TowerCost, TowerShape
from tokencomp.errors import OptionError
from tokencomp.plan import Plan, TowerStage
from tokencomp.tokens import VisualTokens

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from tokencomp.adapters.base import Adapter


def check_tower_stage(plan: Plan, adapter: Adapter) -> Plan:
    """The plan with what its tower stage must know of the model.

    Raises
    ------
    UnsupportedModelError
        The family does not say which patches a visual token reads.
    PlanError
        The tower has no such block in use.
    """
    if plan.tower is None:
        return plan
    layout = adapter.tower_layout()
    layout.check(plan.tower, adapter.family)
    return Plan(plan.stages, replace(plan.tower, frames_apart=layout.frames_apart))


@dataclass
class _Rows:
    """Rows of one tower call that stay.

    Attributes
    ----------
    cells
        The cells of the call.
    chosen : Tensor of int64, shape (kept cells,)
        Numbers of the cells that stay.
    index : Tensor of int64
        Rows of the tower that stay, ascending: (rows,) if packed, else (pictures, rows) without
        the class token.
    unread : Tensor of bool, shape (pictures, rows), or None
        Rows of a dense tower that stay to make all pictures equally long, and that no token reads.
    entered
        Whether the block has been reached from which on rows are missing.
    bounds
        Bounds of sequences before the stage, by identity, and what they are behind it.
    """

    cells: Cells
    chosen: Tensor
    index: Tensor
    unread: Tensor | None = None
    entered: bool = False
    bounds: dict[int, tuple[Tensor, Tensor, int]] = field(default_factory=dict)


class _Local(threading.local):
    """What runs in this thread: arguments of the encoding method, and the call of the tower."""

    kind: Any = "image"
    arguments: Any = None
    cells: Cells | None = None
    rows: _Rows | None = None
    cost: TowerCost | None = None
    tuples: bool = False

    def __init__(self) -> None:
        self.costs: deque[TowerCost] = deque(maxlen=2)


class TowerDrop:
    """Hooks of the tower stage of a plan.

    Parameters
    ----------
    off
        Nothing is dropped in a thread where this returns True.
    """

    def __init__(self, adapter: Adapter, stage: TowerStage, off: Callable[[], bool]) -> None:
        self.stage, self.off = stage, off
        self.layout: Tower = adapter.tower_layout()
        self.shape = TowerShape.of(self.layout)
        self._local = _Local()
        self._handles: list[RemovableHandle | MethodReplacement] = []

    def install(self) -> None:
        """Hook the tower, its blocks, and the modules behind which rows stand again."""
        layout, add = self.layout, self._handles.append
        for name in layout.methods:
            note = functools.partial(self._encode, "video" if "video" in name else "image")
            add(MethodReplacement(layout.owner, name, note))
        add(layout.module.register_forward_pre_hook(self._begin, with_kwargs=True))
        for i, block in enumerate(layout.blocks):
            hook = functools.partial(self._block, i)
            add(block.register_forward_pre_hook(hook, with_kwargs=True))
        add(layout.blocks[-1].register_forward_hook(self._last))
        for block in layout.unused:
            add(MethodReplacement(block, "forward", self._skip))
        for module in layout.restorers:
            add(module.register_forward_hook(self._restore))
        add(layout.module.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        """Undo `install`; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def collect(self, calls: int) -> list[TowerCost]:
        """Costs of the latest `calls` calls of the tower in this thread; empty if unknown."""
        costs = list(self._local.costs)[-calls:] if calls else []
        self._local.costs.clear()
        return costs if len(costs) == calls else []

    # -- around the tower -----------------------------------------------------------------------

    def _encode(self, kind: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the body that encodes media, and note its arguments."""
        local = self._local
        earlier = local.kind, local.arguments
        bound = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        local.kind, local.arguments = kind, {**bound, **bound.get("kwargs", {})}
        try:
            return original(*args, **kwargs)
        finally:
            local.kind, local.arguments = earlier

    @torch.compiler.disable
    def _begin(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        local = self._local
        local.rows = local.cells = local.cost = None
        if self.off():
            return
        self._check_recomputation(tower)
        arguments = compat.bind(tower, args, kwargs)
        pixels = next(arguments[n] for n in ("pixel_values", "hidden_states") if n in arguments)
        grids = arguments.get("grid_thw")
        call = EncoderCall(pixels, grids, local.kind, local.arguments or {})
        local.cells = self.layout.cells(call, self.stage)
        local.cost = TowerCost(self.shape)
        if self.stage.block == 0:
            self._choose(local.cells, local.cells.pixels.flatten(1), local.cells.pixels.shape[-2:])

    def _check_recomputation(self, tower: nn.Module) -> None:
        if compat.recomputed(self.layout.blocks[0]) and compat.recomputes_hooks():
            raise OptionError(
                f"gradient checkpointing of {type(tower).__name__} with a tower stage: this "
                "transformers release would drop patches again in the backward pass. Use "
                "transformers >= 5.23, tower_ratio=0, or model.gradient_checkpointing_disable()."
            )

    def _end(self, tower: nn.Module, args: Any, out: Any) -> None:
        local = self._local
        if local.cost is not None and local.rows is not None:
            self._note_tokens(local.cost, local.rows)
            local.costs.append(local.cost)
        local.cells = local.cost = None
        # Rows of a dense tower may have to be restored behind its projector, which runs later.
        if tower in self.layout.restorers or not isinstance(self.layout, DenseTower):
            local.rows = None

    def _note_tokens(self, cost: TowerCost, rows: _Rows) -> None:
        """Count the rows that go through the projectors."""
        layout, pictures = self.layout, rows.cells.pictures
        if isinstance(layout, DenseTower):
            cost.tokens_before = cost.tokens_after = pictures * len(layout.tables["image"])
            if layout.module not in layout.restorers:  # the projector gets what the tower leaves
                cost.tokens_after = pictures * rows.cells.rows
        else:
            cost.tokens_before, cost.tokens_after = len(rows.cells.members), len(rows.chosen)

    # -- choosing -------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(self, cells: Cells, values: Tensor, pixels: Any = None) -> None:
        """Choose cells by the values (patches, d) of their patches, pixels or hidden states.

        Parameters
        ----------
        pixels
            (height, width) of a patch, if the values are pixels.
        """
        from tokencomp.kernels.dispatch import no_autocast

        chosen, start = [], 0
        with no_autocast(values):
            for parts in cells.parts:
                for grid, keep in zip(parts, self.stage.cells(parts), strict=True):
                    stop = start + math.prod(grid)
                    if keep == stop - start:
                        chosen.append(torch.arange(start, stop, device=values.device))
                    elif keep:
                        x = _cell_values(values, cells.members[start:stop], pixels is not None)
                        special = torch.zeros(len(x), dtype=torch.bool, device=x.device)
                        size = None if pixels is None else (int(pixels[0]), int(pixels[1]))
                        tokens = VisualTokens(x, grid, special, kind=cells.kind, pixels=size)
                        chosen.append(self.stage.reducer.reduced(tokens, keep).keep + start)
                    start = stop
        self._local.rows = _rows_of(cells, torch.cat(chosen))

    def _block_values(self, cells: Cells, hidden: Tensor) -> Tensor:
        """Hidden states (patches, d) of a block's input, in the order of the tower's input."""
        if not cells.pictures:
            d = hidden.shape[-1]
            if cells.order is None:
                return hidden
            own = hidden.view(len(cells.members), -1, d)
            return own[cells.order.argsort()].view(-1, d)
        per_picture = len(cells.pixels) // len(hidden)
        return hidden[:, hidden.shape[1] - per_picture :].flatten(0, 1)

    # -- blocks ---------------------------------------------------------------------------------

    @torch.compiler.disable
    def _block(self, i: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Arguments of block `i`: fewer rows, and what belongs to them."""
        local = self._local
        if local.cells is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if i == self.stage.block and local.rows is None:
            self._choose(local.cells, self._block_values(local.cells, hidden))
        if i < self.stage.block:
            bounds = kwargs.get("cu_seqlens")
            bounds = _equal_bounds(*hidden.shape[:2]) if bounds is None else bounds
            local.cost.block(bounds, bounds)  # type: ignore[union-attr]
            return None
        rows: Any = local.rows
        change = self._dense_arguments if rows.cells.pictures else self._packed_arguments
        return change(rows, hidden, args, kwargs)

    def _packed_arguments(self, rows: _Rows, hidden: Tensor, args: Any, kwargs: Any) -> Any:
        kwargs, index = dict(kwargs), rows.index
        if not rows.entered:
            hidden, rows.entered = hidden[index], True
        total, bounds = len(rows.cells.pixels), kwargs["cu_seqlens"]
        if id(bounds) not in rows.bounds:  # the same tensor comes to every block
            rows.bounds[id(bounds)] = (bounds, *_bounds_behind(bounds, index, total))
        _, kwargs["cu_seqlens"], longest = rows.bounds[id(bounds)]
        self._local.cost.block(bounds, kwargs["cu_seqlens"])  # type: ignore[union-attr]
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = longest
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = tuple(t[index] for t in tables)
        return _with_hidden(hidden, args, kwargs)

    def _dense_arguments(self, rows: _Rows, hidden: Tensor, args: Any, kwargs: Any) -> Any:
        kwargs, args = dict(kwargs), list(args)
        index, per_picture = rows.index, len(rows.cells.pixels) // len(rows.index)
        if not rows.entered:
            first = hidden.shape[1] - per_picture  # the class token, if there is one, stays
            head = torch.arange(first, device=index.device).expand(len(index), -1)
            rows.index = index = torch.cat([head, index + first], 1)
            if first and rows.unread is not None:
                rows.unread = torch.cat([torch.zeros_like(head, dtype=torch.bool), rows.unread], 1)
            hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
            rows.entered = True
        full = per_picture + index.shape[1] - rows.cells.rows
        lengths = (full, index.shape[1])
        self._local.cost.block(*(_equal_bounds(len(index), n) for n in lengths))  # type: ignore[union-attr]
        if isinstance(kwargs.get("attention_mask"), Tensor):
            kwargs["attention_mask"] = _mask_rows(kwargs["attention_mask"], index)
        elif len(args) > 1 and isinstance(args[1], Tensor):
            args[1] = _mask_rows(args[1], index)
        return _with_hidden(hidden, tuple(args), kwargs)

    def _last(self, block: nn.Module, args: Any, out: Any) -> None:
        self._local.tuples = isinstance(out, tuple)

    def _skip(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An unused block returns its input, in the form in which the last used one returns it."""
        if self._local.cells is None:
            return original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self._local.tuples else hidden

    # -- full length ----------------------------------------------------------------------------

    def full_length(self, x: Tensor) -> Tensor:
        """Values of the rows of a running call, spread over all rows; NaN where they left.

        Parameters
        ----------
        x : Tensor
            (1, rows, d) of a packed tower, (pictures, rows, d) of a dense one. Rows of a block that
            has seen all patches stay as they are.
        """
        rows = self._local.rows
        if rows is None or not rows.entered:
            return x
        if rows.cells.pictures:
            return _dense_full(x, rows)
        full = x.new_full((1, len(rows.cells.pixels), x.shape[-1]), math.nan)
        return full.index_copy(1, rows.index, x)

    @torch.compiler.disable
    def _restore(self, module: nn.Module, args: Any, out: Any) -> Any:
        """The output of a restoring module at its full length."""
        rows = self._local.rows
        if rows is None or not rows.entered:
            return None
        if not rows.cells.pictures:
            full = out.new_full((len(rows.cells.members), out.shape[-1]), math.nan)
            unit = rows.cells.members.shape[1]
            return full.index_copy(0, rows.index[::unit] // unit, out)
        if isinstance(out, Tensor):
            self._local.rows = None
            return _dense_full(out, rows)
        for name in ("last_hidden_state", "hidden_states"):
            states = getattr(out, name, None)
            if isinstance(states, Tensor):
                setattr(out, name, _dense_full(states, rows))
            elif states is not None:
                setattr(out, name, tuple(s if s is None else _dense_full(s, rows) for s in states))
        return out


def _cell_values(values: Tensor, members: Tensor, apart: bool) -> Tensor:
    """Values (patches, d) of cells, float32: those of all patches side by side, or their mean."""
    present = members >= 0
    x = values[members.clamp(min=0)].float() * present[..., None]
    return x.flatten(1) if apart else x.sum(1) / present.sum(1, keepdim=True)


def _rows_of(cells: Cells, chosen: Tensor) -> _Rows:
    """Rows of the tower that the chosen cells read, without waiting for the device."""
    if not cells.pictures:
        place = chosen if cells.order is None else cells.order.argsort()[chosen]
        place, unit = place.sort().values, cells.members.shape[1]
        index = (place[:, None] * unit + torch.arange(unit, device=place.device)).flatten()
        return _Rows(cells, chosen, index)
    total = len(cells.pixels)
    # Members of -1 mark the last place, which is no patch.
    read = torch.zeros(total + 1, dtype=torch.bool, device=chosen.device)
    read[cells.members[chosen].flatten()] = True
    read = read[:total].view(-1, total // cells.pictures)
    # Patches that are read come first, then the first of the others, up to the common number.
    index = (~read).to(torch.uint8).argsort(dim=1, stable=True)[:, : cells.rows].sort(1).values
    return _Rows(cells, chosen, index, ~read.gather(1, index))


def _bounds_behind(bounds: Tensor, index: Tensor, total: int) -> tuple[Tensor, int]:
    """Bounds of the sequences that are left, and the length of the longest; empty ones vanish."""
    before = torch.searchsorted(index, bounds.to(index))
    left = torch.unique_consecutive(before).to(bounds.dtype)
    return left, int(left.diff().max())


def _equal_bounds(count: int, length: int) -> Tensor:
    """Bounds of `count` sequences of equal length."""
    return torch.arange(count + 1) * length


def _mask_rows(mask: Tensor, index: Tensor) -> Tensor:
    """A mask (pictures, 1, rows, rows) or (pictures, rows) for the rows that are left."""
    if mask.ndim == 2:
        return mask.gather(1, index)
    columns = index[:, None, None].expand(-1, *mask.shape[1:3], -1)
    mask = mask.expand(len(index), -1, -1, -1).gather(3, columns)
    if mask.shape[2] == 1:
        return mask
    return mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


def _with_hidden(hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    if args:
        return (hidden, *args[1:]), kwargs
    return (), {**kwargs, "hidden_states": hidden}


def _dense_full(x: Tensor, rows: _Rows) -> Tensor:
    """Rows (pictures, kept, d) spread over all patches; others, and what nobody reads, are NaN.

    The class token is the first row of `rows.index`, if there is one. A projector may get its
    input without it.
    """
    index, unread = rows.index, rows.unread
    patches = len(rows.cells.pixels) // len(index)
    if x.ndim != 3 or not index.shape[1] >= x.shape[1] >= rows.cells.rows:
        return x
    head = index.shape[1] - rows.cells.rows  # 1 with a class token
    if x.shape[1] == rows.cells.rows:
        index, unread = index[:, head:] - head, unread[:, head:]  # type: ignore[index]
        head = 0
    x = x.masked_fill(unread[..., None], math.nan)  # type: ignore[index]
    full = x.new_full((len(x), head + patches, x.shape[-1]), math.nan)
    return full.scatter(1, index[..., None].expand(-1, -1, x.shape[-1]), x)
