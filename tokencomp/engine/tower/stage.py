"""The stage in the vision tower: drops patches before a block, and restores full length with NaN.

From block k on the tower sees fewer patches. The output of the module that converts patches to
tokens (or of the tower, if that module needs the whole picture) is restored to full length, because
the model assigns features to placeholders by order. Dropped rows are NaN: NaN passes through later
resampling, marks exactly the tokens that read a dropped patch, needs no table next to the features,
and makes the output NaN if code bypasses the entry of the decoder, where these tokens are removed.

    patches        0    1    2    3    4    5    6    7
    blocks ≥ k     0    1              4    5              fewer rows
    restored       0    1   NaN  NaN   4    5   NaN  NaN   full length again
    tokens of 2    a        NaN        c        NaN        NaN: reads a dropped patch
    decoder        a                   c                   only tokens without NaN enter
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.towers.base import Cells, EncoderCall, Tower
from tokencomp.adapters.towers.dense import DenseTower
from tokencomp.adapters.towers.packed import PackedTower
from tokencomp.engine.call import Call, RunningCalls, TowerRecord
from tokencomp.engine.tower.flops import TowerCost, TowerShape
from tokencomp.engine.tower.memory import TILE, copies, owners, recalled, running_prompt
from tokencomp.engine.tower.rows import DenseRows, PackedRows, TowerRows, equal_bounds, rows_of
from tokencomp.engine.tower.signals import TowerProbe, attention_blocks, check_signals
from tokencomp.errors import OptionError
from tokencomp.plan.plan import Plan, TowerStage
from tokencomp.reducers.base import reduced
from tokencomp.tokens.signals import SEEN
from tokencomp.tokens.stacks import rows_of as rows_of_runs
from tokencomp.tokens.stacks import starts_of
from tokencomp.tokens.tokens import Memories, Memory, Modality, Tokens
from tokencomp.torchlib import compat
from tokencomp.torchlib.checkpointing import checkpointed_since
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.replace import MethodReplacement


def check_tower_stage(plan: Plan, adapter: Adapter) -> Plan:
    """Complete the tower stage of a plan for a model; raises if its cells are unknown."""
    if plan.tower is None:
        return plan
    layout, stage = adapter.tower_layout(), plan.tower
    layout.check(stage, adapter.family)
    return Plan(plan.stages, replace(stage, frames_apart=layout.frames_apart))


@torch.no_grad()
def chosen_cells(
    cells: Cells, stage: TowerStage, values: Tensor, pixels: tuple[int, int, int] | None = None
) -> Tensor:
    """The kept cells, int64, shape (kept cells,), in no particular order.

    Parameters
    ----------
    values : Tensor, shape (patches, d)
        Pixels or hidden states of the patches, in the order of the tower's input.
    pixels
        (frames, height, width) of a patch, if the values are pixels.
    """
    from tokencomp.kernels.dispatch import exact

    # Keep count of every part; parts that share a budget divide it.
    grids = list(itertools.chain.from_iterable(cells.parts))
    keeps = list(itertools.chain.from_iterable(map(stage.cells, cells.parts)))
    lengths = [math.prod(grid) for grid in grids]
    ends = starts_of(lengths)

    def cells_of(parts: list[int]) -> Tensor:
        return torch.from_numpy(rows_of_runs(ends, parts)).to(values.device)

    # Parts that keep all cells, or none, need no reducer.
    whole = [i for i, length in enumerate(lengths) if keeps[i] == length]
    some = [i for i, length in enumerate(lengths) if 0 < keeps[i] < length]
    chosen = [cells_of(whole)] if whole else []
    if some:
        rows = cells_of(some)
        tokens = Tokens(
            features=_cell_values(values, cells.members[rows], pixels is not None),
            grids=[grids[i] for i in some],
            budgets=[keeps[i] for i in some],
            modalities=[cells.modality for _ in some],
            pixels=pixels,
        )
        with exact(values, stage.reducer.traits.batched):
            kept = reduced(stage.reducer, tokens)
        chosen.append(rows[kept.rows])
    return torch.cat(chosen)


@torch.no_grad()
def decided_cells(
    cells: Cells,
    stage: TowerStage,
    levels: Tensor | None = None,
    memories: list[Memory] | None = None,
) -> Tensor:
    """The kept cells, int64, shape (kept cells,), if the pixels decide how many.

    Parameters
    ----------
    levels, memories
        As in `Tokens.levels` and `Tokens.seen`.
    """
    from tokencomp.kernels.dispatch import exact

    grids = list(itertools.chain.from_iterable(cells.parts))
    frames, height, width = cells.pixels.shape[-3:]
    # A cell with fewer patches repeats its first.
    members = torch.where(cells.members < 0, cells.members[:, :1], cells.members)
    tokens = Tokens(
        features=cells.pixels.flatten(1)[members].flatten(1),
        grids=grids,
        budgets=[math.prod(grid) for grid in grids],
        modalities=[cells.modality for _ in grids],
        pixels=(frames, height, width),
        levels=levels,
        seen=memories,
        keys=[(TILE, *key) for key in cells.keys],
    )
    with exact(cells.pixels, stage.reducer.traits.batched):
        return reduced(stage.reducer, tokens).rows


def patch_values(cells: Cells, hidden: Tensor) -> Tensor:
    """Hidden states (patches, d) of a block's input, in the order of the tower's input."""
    if cells.pictures:
        per_picture = len(cells.pixels) // cells.pictures
        return hidden[:, hidden.shape[1] - per_picture :].flatten(0, 1)
    if cells.order is None:
        return hidden
    by_cell = hidden.view(len(cells.members), -1, hidden.shape[-1])
    return by_cell[cells.order.argsort()].flatten(0, 1)


def _cell_values(values: Tensor, members: Tensor, apart: bool) -> Tensor:
    """Float32 values of cells (patches, d): concatenated over their patches, or their mean."""
    present = (members >= 0)[..., None]
    x = values[members.clamp(min=0)].float().masked_fill_(~present, 0)
    return x.flatten(1) if apart else x.sum(1) / present.sum(1)


# -- dropping patches ----------------------------------------------------------------------------


class _Local(threading.local):
    """Thread-local state: arguments of the encoding method, and the call of the tower."""

    modality: Any = "image"
    arguments: Any = None
    cells: Cells | None = None
    rows: TowerRows | None = None
    cost: TowerCost | None = None
    tuples: bool = False
    records: bool = False  # gradients

    def __init__(self) -> None:
        self.costs: deque[TowerCost] = deque(maxlen=2)
        self.seen: Memories = {}  # after the calls of this thread


class TowerDrop(Hooked):
    """Hooks of the tower stage of a plan.

    Parameters
    ----------
    calls
        The state of every thread.
    off
        Nothing is dropped in a thread where this returns True.
    """

    def __init__(
        self, adapter: Adapter, stage: TowerStage, calls: RunningCalls, off: Callable[[], bool]
    ) -> None:
        self.adapter, self.stage, self.calls, self.off = adapter, stage, calls, off
        self.layout: Tower = adapter.tower_layout()
        self.shape = TowerShape.of(self.layout)
        # Whether rows are restored by a projector that runs after the tower, not within it.
        self._projector_restores = (
            isinstance(self.layout, DenseTower) and self.layout.module not in self.layout.restorers
        )
        self._local = _Local()

    def install(self) -> None:
        """Hook the tower, its blocks, and the modules whose output is restored."""
        layout, add = self.layout, self._handles.append
        for name in layout.methods:
            note = functools.partial(self._encode, "video" if "video" in name else "image")
            add(MethodReplacement(layout.owner, name, note))
        add(layout.module.register_forward_pre_hook(self._begin, with_kwargs=True))
        if isinstance(layout, PackedTower) and layout.embedding is not None:
            add(MethodReplacement(layout.embedding, "forward", self._embed))
        for i, block in enumerate(layout.blocks):
            hook = functools.partial(self._block, i)
            add(block.register_forward_pre_hook(hook, with_kwargs=True))
            if self.stage.decides and isinstance(layout, DenseTower):
                (attn,) = attention_blocks(block)
                add(attn.register_forward_pre_hook(self._hide_padding, with_kwargs=True))
        add(layout.blocks[-1].register_forward_hook(self._last))
        for block in layout.unused:
            add(MethodReplacement(block, "forward", self._skip))
        for module in layout.restorers:
            add(module.register_forward_hook(self._restore))
        if isinstance(layout, DenseTower) and not self._projector_restores:
            project = functools.partial(self._project, layout)
            add(MethodReplacement(layout.projectors[0], "forward", project))
        add(layout.module.register_forward_hook(self._end, always_call=True))

    def collect(self, calls: int) -> list[TowerCost]:
        """Costs of the latest `calls` calls of the tower in this thread; empty if unknown."""
        costs = list(self._local.costs)[-calls:] if calls else []
        self._local.costs.clear()
        return costs if len(costs) == calls else []

    def seen(self, cache: Any, modalities: set[Modality]) -> Memories | None:
        """Memories after a prompt with media of `modalities`; None if the stage has none."""
        latest, self._local.seen = self._local.seen, {}
        if SEEN not in self.stage.reducer.needs:
            return None
        return recalled(cache) | {m: latest[m] for m in modalities & latest.keys()}

    # -- around the tower -----------------------------------------------------------------------

    def _encode(
        self, modality: str, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call a method of the body that encodes media, and store its arguments."""
        local = self._local
        earlier = local.modality, local.arguments
        bound = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        local.modality, local.arguments = modality, {**bound, **bound.get("kwargs", {})}
        try:
            return original(*args, **kwargs)
        finally:
            local.modality, local.arguments = earlier

    @compat.not_compiled
    def _begin(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        local = self._local
        local.rows = local.cells = local.cost = None
        if self.off():
            return
        self._check_recomputation(tower)
        local.records = torch.is_grad_enabled()
        # Which patches every visual token reads in this call.
        arguments = compat.bind(tower, args, kwargs)
        pixels = next(arguments[n] for n in ("pixel_values", "hidden_states") if n in arguments)
        grids = arguments.get("grid_thw")
        modality = local.modality
        if isinstance(self.layout, PackedTower) and self.adapter.encodes_now == "video":
            modality = "video"
        prompt = ids = cache = None
        if SEEN in self.stage.reducer.needs:
            prompt, ids, cache = running_prompt(self.adapter, self.calls.state.noted)
        call = EncoderCall(pixels, grids, modality, local.arguments or {}, prompt, ids)
        local.cells = self.layout.cells(call, self.stage)
        local.cost = TowerCost(self.shape)
        # Stages before the first block choose by pixels, now; later stages in `_block`.
        if self.stage.decides:
            local.rows = rows_of(local.cells, self._decided(local.cells, prompt, cache))
        elif self.stage.block == 0:
            pixels = local.cells.pixels
            frames, height, width = pixels.shape[-3:]
            self._choose(local.cells, pixels.flatten(1), (frames, height, width))

    def _decided(self, cells: Cells, modalities: Tensor | None, cache: Any) -> Tensor:
        """The kept cells, if the pixels decide how many."""
        levels = 1 / (255 * torch.tensor(self.layout.std, device=cells.pixels.device))
        if modalities is None:
            return decided_cells(cells, self.stage, levels)
        memories = copies(recalled(cache), cells.modality, len(modalities))
        lengths = cells.tokens or [math.prod(grid) for part in cells.parts for grid in part]
        own = [memories[b] for b in owners(modalities, cells.modality, lengths)]
        chosen = decided_cells(cells, self.stage, levels, own)
        self._local.seen[cells.modality] = memories
        return chosen

    def _check_recomputation(self, tower: nn.Module) -> None:
        if compat.recomputed(self.layout.blocks[0]) and compat.recomputes_hooks():
            raise OptionError(
                f"gradient checkpointing of {type(tower).__name__} with a tower stage: this "
                "transformers release would drop patches again in the backward pass. Use "
                "transformers >= 5.23, tower_ratio=0, or model.gradient_checkpointing_disable()."
            )

    def _checkpointed(self, module: nn.Module, hidden: Tensor) -> bool:
        """Whether a backward pass would run hooks of a part of the tower once more."""
        if not self._local.records:
            return False
        learnt = hidden.requires_grad or any(p.requires_grad for p in module.parameters())
        return learnt and checkpointed_since(self.layout.module)

    def _check_checkpointed(self, block: nn.Module, hidden: Tensor) -> None:
        if self._checkpointed(block, hidden):
            tower = type(self.layout.module).__name__
            raise OptionError(
                f"activation checkpointing of blocks of {tower} after a tower "
                "stage: the backward pass would run them once more with all patches. Wrap them "
                "before patch(), or use model.gradient_checkpointing_enable() or tower_ratio=0."
            )

    def _end(self, tower: nn.Module, args: Any, out: Any) -> None:
        local = self._local
        if local.cost is not None and local.rows is not None:
            self._note_tokens(local.cost, local.rows)
            local.costs.append(local.cost)
        local.cells = local.cost = None
        if not self._projector_restores:
            local.rows = None

    def _note_tokens(self, cost: TowerCost, rows: TowerRows) -> None:
        """Count the rows that enter the projectors."""
        layout, cells = self.layout, rows.cells
        if isinstance(layout, DenseTower):
            cost.tokens_before = cost.tokens_after = cells.pictures * layout.projected(
                cells.modality
            )
            if self._projector_restores:  # it gets only kept rows
                cost.tokens_after = len(rows.index) * cells.rows
        else:
            cost.tokens_before = len(cells.members)
            cost.tokens_after = len(rows.index) // cells.members.shape[1]

    @compat.not_compiled
    def _embed(self, original: Callable[..., Any], pixels: Tensor) -> Tensor:
        """Embed only kept patches, if a stage before the first block has chosen them."""
        rows = self._local.rows
        return rows.embedded(original, pixels) if isinstance(rows, PackedRows) else original(pixels)

    # -- blocks ---------------------------------------------------------------------------------

    def _choose(
        self, cells: Cells, values: Tensor, pixels: tuple[int, int, int] | None = None
    ) -> None:
        """Store the rows of the kept cells, see `chosen_cells`."""
        self._local.rows = rows_of(cells, chosen_cells(cells, self.stage, values, pixels))

    @compat.not_compiled
    def _block(self, i: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Arguments of block `i` for the kept rows."""
        local = self._local
        if local.cells is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if i == self.stage.block and local.rows is None:
            self._choose(local.cells, patch_values(local.cells, hidden))
        if i < self.stage.block:
            bounds = kwargs.get("cu_seqlens")
            bounds = equal_bounds(*hidden.shape[:2]) if bounds is None else bounds
            local.cost.block(bounds, bounds)  # type: ignore[union-attr]  # set with `cells`
            return None
        self._check_checkpointed(block, hidden)
        rows: Any = local.rows
        return rows.arguments(hidden, args, kwargs, local.cost)

    @compat.not_compiled
    def _hide_padding(self, attn: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hide the padding rows of pictures that keep fewer patches than others."""
        rows = self._local.rows
        if not isinstance(rows, DenseRows) or rows.lengths is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._checkpointed(attn, hidden):
            raise OptionError(
                f"gradient checkpointing with reducer {self.stage.reducer.name!r}: the backward "
                "pass would run blocks of the vision tower again, whose pictures keep different "
                "numbers of patches. Call gradient_checkpointing_disable() of the tower."
            )
        mask = rows.padding_mask(self.layout.module.config, hidden)
        return args[:1], {**kwargs, "attention_mask": mask}

    def _last(self, block: nn.Module, args: Any, out: Any) -> None:
        self._local.tuples = isinstance(out, tuple)

    def _skip(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An unused block returns its input, in the form of the last used block."""
        if self._local.cells is None:
            return original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self._local.tuples else hidden

    # -- full length ----------------------------------------------------------------------------

    def lengths(self) -> Tensor | None:
        """See `DenseRows`."""
        rows = self._local.rows
        return rows.lengths if isinstance(rows, DenseRows) else None

    def full_length(self, x: Tensor) -> Tensor:
        """Restore values of the rows of a running call, see `TowerRows.full_length`.

        Values of blocks that see all patches are unchanged.
        """
        rows = self._local.rows
        return x if rows is None or not rows.entered else rows.full_length(x)

    @compat.not_compiled
    def _restore(self, module: nn.Module, args: Any, out: Any) -> Any:
        """The output of a restoring module at full length."""
        rows = self._local.rows
        if rows is None or not rows.entered:
            return None
        if self._projector_restores:
            self._local.rows = None
        return rows.restored(out)

    @compat.not_compiled
    def _project(
        self, layout: DenseTower, original: Callable[..., Tensor], x: Tensor, *args: Any
    ) -> Tensor:
        """Call a projector with zeros for NaN rows; then set tokens that read them to NaN.

        Gradients of its weights sum over all rows, and NaN · 0 is NaN.
        """
        if self.off() or not torch.is_grad_enabled():
            return original(x, *args)
        missing = x.isnan().any(-1)
        out = original(x.masked_fill(missing[..., None], 0.0), *args)
        return out.masked_fill(layout.missing_tokens(missing, out.shape[1])[..., None], torch.nan)


# -- what a plan needs in the tower --------------------------------------------------------------


# Bodies that have had a tower stage: features that lack tokens may still be passed in.
_HAD_STAGE: WeakSet[nn.Module] = WeakSet()


class TowerHooks:
    """Installs the hooks of tower stage and signals, and passes their records to prompts.

    Parameters
    ----------
    calls
        The state of every thread.
    off
        Whether compression is off in the calling thread.

    Attributes
    ----------
    had_stage
        Whether features with dropped tokens may be passed in.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls, off: Callable[[], bool]) -> None:
        self.adapter, self.calls, self.off = adapter, calls, off
        self.drop: TowerDrop | None = None
        self.probe: TowerProbe | None = None
        self.had_stage = adapter.body in _HAD_STAGE

    def install(self, plan: Plan) -> None:
        """Install the hooks that `plan` needs."""
        if plan.tower is not None:  # before the probe, which sees only kept rows
            _HAD_STAGE.add(self.adapter.body)
            self.had_stage = True
            self.drop = TowerDrop(self.adapter, plan.tower, self.calls, self.off)
            self.drop.install()
        signals = check_signals(plan, self.adapter)
        if signals:
            drop = self.drop
            rows = (drop.full_length, drop.lengths) if drop else ()
            self.probe = TowerProbe(self.adapter, signals, self.off, *rows)
            self.probe.install()

    def remove(self) -> None:
        """Remove the hooks; safe to call twice."""
        for part in (self.drop, self.probe):
            if part is not None:
                part.remove()
        self.drop = self.probe = None

    def collect(self, call: Call, inputs: Mapping[str, Any]) -> TowerRecord:
        """What was recorded for the prompt of a call.

        Raises
        ------
        OptionError
            The call, whose `inputs` these are, chose another layer of the tower than its config.
        """
        record = TowerRecord()
        if self.probe is not None:
            layer, usual = inputs.get("vision_feature_layer"), self.adapter.feature_layer
            if layer is not None and layer != usual:
                raise OptionError(
                    f"vision_feature_layer={layer!r} in a call, but the config has {usual!r}, "
                    "whose blocks the reducer reads. Change the config before patch()."
                )
            record.signals = self.probe.collect(call.spans)
        if self.drop is not None:
            record.costs = self.drop.collect(len(call.modalities - {"audio"}))
            record.seen = self.drop.seen(call.cache, call.modalities)
        return record
