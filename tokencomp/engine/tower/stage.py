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
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.towers.base import Cells, Tower, TowerCall, attention_blocks
from tokencomp.adapters.towers.dense import DenseTower
from tokencomp.adapters.towers.packed import PackedTower
from tokencomp.engine.cache import memory_of
from tokencomp.engine.call import Call, CallHooks, Noted, RunningCalls
from tokencomp.engine.memory import Entered
from tokencomp.engine.tower.rows import DenseRows, TowerCost, TowerRows, equal_bounds, kept_rows
from tokencomp.engine.tower.signals import TowerProbe, check_signals
from tokencomp.errors import OptionError, SpanError
from tokencomp.plan.plan import Plan, TowerStage
from tokencomp.reducers.base import reduced
from tokencomp.tokens.signals import SEEN
from tokencomp.tokens.stacks import rows_of, starts_of
from tokencomp.tokens.tokens import CODES, LastKept, Tokens, VisualSpan
from tokencomp.torchlib import compat
from tokencomp.torchlib.checkpointing import checkpointed_since
from tokencomp.torchlib.replace import MethodReplacement


@torch.no_grad()
def chosen_cells(
    cells: Cells,
    stage: TowerStage,
    hidden: Tensor | None = None,
    levels: Tensor | None = None,
    seen: list[LastKept] | None = None,
) -> Tensor:
    """The kept cells, int64, shape (kept cells,), in no particular order.

    `hidden` is the input of the block of the stage; None: the reducer gets pixels. `levels` and
    `seen` are those of `Tokens`.
    """
    from tokencomp.kernels.dispatch import exact

    # Keep count of every part; parts that share a budget divide it.
    grids = [grid for part in cells.parts for grid in part]
    keeps = [keep for part in cells.parts for keep in stage.cells(part, cells.modality)]
    lengths = [math.prod(grid) for grid in grids]
    ends, every = starts_of(lengths), range(len(grids))

    def cells_of(parts: list[int]) -> Tensor:
        return torch.from_numpy(rows_of(ends, parts)).to(cells.members.device)

    # Parts that keep all cells, or none, need no reducer, unless it decides how many.
    some = [i for i in every if stage.decides or 0 < keeps[i] < lengths[i]]
    whole = [i for i in every if not stage.decides and keeps[i] == lengths[i]]
    chosen = [cells_of(whole)] if whole else []
    if some:
        rows, (frames, height, width) = cells_of(some), cells.pixels.shape[-3:]
        tokens = Tokens(
            features=_features(cells, rows, stage, hidden),
            grids=[grids[i] for i in some],
            budgets=[keeps[i] for i in some],
            modalities=[cells.modality for _ in some],
            pixels=(frames, height, width) if hidden is None else None,
            levels=levels,
            seen=seen,
            keys=[cells.keys[i] for i in some] if cells.keys else [],
        )
        with exact(tokens.features, stage.reducer.traits.batched):
            chosen.append(rows[reduced(stage.reducer, tokens).patches])
    return torch.cat(chosen)


def _features(cells: Cells, rows: Tensor, stage: TowerStage, hidden: Tensor | None) -> Tensor:
    """Pixels of the patches of cells, concatenated; or the mean of their hidden states."""
    # -1: the cell has fewer patches than others, as at the edge of a picture.
    members = cells.members[rows]
    present = members >= 0
    if stage.decides:  # it compares pixels: a cell with fewer patches repeats its first
        members = torch.where(present, members, members[:, :1])
        return cells.pixels.flatten(1)[members].flatten(1)
    values = cells.pixels.flatten(1) if hidden is None else _patch_values(cells, hidden)
    x = values[members.clamp(min=0)].float().masked_fill_(~present[..., None], 0)
    return x.flatten(1) if hidden is None else x.sum(1) / present.sum(1, keepdim=True)


def _patch_values(cells: Cells, hidden: Tensor) -> Tensor:
    """Hidden states (patches, d) of a block's input, in the order of the tower's input."""
    if cells.pictures:
        per_picture = len(cells.pixels) // cells.pictures
        return hidden[:, hidden.shape[1] - per_picture :].flatten(0, 1)
    if cells.order is None:
        return hidden
    by_cell = hidden.view(len(cells.members), -1, hidden.shape[-1])
    return by_cell[cells.order.argsort()].flatten(0, 1)


# -- earlier pictures ----------------------------------------------------------------------------

# The memory of the cache has them, see `tokencomp.engine.memory`.


def running_prompt(adapter: Adapter, noted: Noted) -> tuple[Tensor, Tensor | None, Any]:
    """Modalities (B, L) of the prompt that is being encoded, its ids, and its cache.

    `generate` encodes media before it calls the model, with the columns that its cache holds.
    Raises `SpanError` if the vision tower was called for no prompt.
    """
    if noted.modalities is not None:
        inputs = noted.inputs or {}
        return noted.modalities, inputs.get("input_ids"), compat.get_cache(inputs)
    arguments = noted.arguments or {}
    modalities = adapter.modalities(arguments) if arguments else None
    if modalities is None:
        raise SpanError(
            "the vision tower was called for no prompt, so it is not known which pictures the "
            "model has seen before. Pass pixels to the model or to generate, or take a reducer "
            "that looks at single pictures, such as 'pixelprune'."
        )
    # `generate` passes all columns; the cache holds the first of them.
    cache, ids = compat.get_cache(arguments), arguments.get("input_ids")
    held = 0 if cache is None else cache.get_seq_length()
    return modalities[:, held:], None if ids is None else ids[:, held:], cache


def kept_before(call: TowerCall, cells: Cells) -> list[LastKept]:
    """What every part of the cells of a call is compared with, see `Tokens.seen`.

    Media are in the order of the batch; parts of a sample share a dict.
    """
    assert call.modalities is not None
    signal, shown = (SEEN, cells.modality), memory_of(call.cache).of(len(call.modalities))
    kept: list[LastKept] = [
        {key[2:]: places.known() for key, places in sample.items() if key[:2] == signal}
        for sample in shown
    ]
    # Media come in the order of the batch: the sample of each follows from the tokens so far.
    ends = (call.modalities == CODES[cells.modality]).sum(1).cumsum(0)
    lengths = cells.tokens or [math.prod(grid) for part in cells.parts for grid in part]
    owners = np.searchsorted(ends[:-1].numpy(force=True), np.cumsum(lengths))
    return [kept[b] for b in owners]


def entered_pictures(
    cells: Cells, stage: TowerStage, spans: list[list[VisualSpan]]
) -> list[Entered]:
    """The parts of the cells of a call, for the memory of a cache; empty for other media."""
    runs = [
        (b, span.start + np.flatnonzero(~span.fixed_mask()))
        for b, sample in enumerate(spans)
        for span in sample
        if span.modality == cells.modality
    ]
    columns = np.concatenate([columns for _, columns in runs])
    samples = np.repeat([b for b, _ in runs], [len(columns) for _, columns in runs])
    if len(columns) != len(cells.members):  # beams repeat the rows of media that were encoded once
        return []
    if cells.patches is not None:
        columns, samples = columns[cells.patches], samples[cells.patches]
    grids = [grid for part in cells.parts for grid in part]
    ends, entered = starts_of([math.prod(grid) for grid in grids]), []
    keys = cells.keys or [(h, w) for _, h, w in grids]  # `Tokens.keys`
    for (t, h, w), key, first, end in zip(grids, keys, ends, ends[1:], strict=False):

        def values(numbers: Tensor, first: int = int(first)) -> Tensor:
            return _features(cells, numbers.to(cells.members.device) + first, stage, None)

        places = columns[first:end].reshape(t, h * w)
        entered.append(Entered(int(samples[first]), (SEEN, cells.modality, *key), places, values))
    return entered


# -- dropping patches ----------------------------------------------------------------------------


class TowerDrop(CallHooks):
    """Hooks of the tower stage of a plan."""

    def __init__(self, adapter: Adapter, calls: RunningCalls, stage: TowerStage) -> None:
        super().__init__(adapter, calls)
        self.stage = stage
        self.layout: Tower = adapter.tower_layout()
        self.cost = TowerCost.of(self.layout)
        # Whether rows are restored by a projector that runs after the tower, not within it.
        self._projector_restores = (
            isinstance(self.layout, DenseTower) and self.layout.module not in self.layout.restorers
        )

    def install(self) -> None:
        """Hook the tower, its blocks, and the modules whose output is restored."""
        layout, add = self.layout, self._handles.append
        self._before(layout.module, self._begin)
        if isinstance(layout, PackedTower) and layout.embedding is not None:
            add(MethodReplacement(layout.embedding, "forward", self._embed))
        for i, block in enumerate(layout.blocks):
            self._before(block, functools.partial(self._block, i))
            if self.stage.decides and isinstance(layout, DenseTower):
                (attn,) = attention_blocks(block)
                self._before(attn, self._hide_padding)
        for block in layout.unused:
            add(MethodReplacement(block, "forward", self._skip))
        for module in layout.restorers:
            self._after(module, self._restore)
        if isinstance(layout, DenseTower) and not self._projector_restores:
            project = functools.partial(self._project, layout)
            add(MethodReplacement(layout.projectors[0], "forward", project))
        self._after(layout.module, self._end, always_call=True)

    def collect(self, call: Call) -> None:
        """Note the costs of the calls that have encoded the media of a prompt, if they are known.

        The prompt gets the pictures that later ones are compared with.
        """
        modalities = call.modalities - {"audio"}
        encoded = [x for x in self.calls.state.noted.encoded or () if x.rows is not None]
        encoded = encoded[-len(modalities) :]
        for tower_call in encoded if SEEN in self.stage.reducer.needs else ():
            cells = tower_call.cells
            if cells.modality in modalities:
                entered = entered_pictures(cells, self.stage, call.spans)
                call.entered += entered
                call.compared |= {(SEEN, cells.modality)} if entered else set()
        if len(encoded) == len(modalities):
            call.tower_costs = [tower_call.cost for tower_call in encoded]

    # -- around the tower -----------------------------------------------------------------------

    def _begin(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        state, stage = self.calls.state, self.stage
        state.tower = None
        if state.disabled:
            return
        # Which patches every visual token reads in this call.
        arguments = compat.bind(tower, args, kwargs)
        pixels = next(arguments[n] for n in ("pixel_values", "hidden_states") if n in arguments)
        compares = SEEN in stage.reducer.needs
        prompt = running_prompt(self.adapter, state.noted) if compares else ()
        call = TowerCall(pixels, arguments.get("grid_thw"), *self.adapter.encoded.running, *prompt)
        call.cells, call.cost = self.layout.cells(call, stage), replace(self.cost, bounds=[])
        # A stage before the first block chooses by pixels, now; later stages in `_block`.
        if stage.block == 0:
            levels = 1 / (255 * torch.tensor(self.layout.std, device=pixels.device))
            seen = kept_before(call, call.cells) if compares else None
            call.rows = kept_rows(call.cells, chosen_cells(call.cells, stage, None, levels, seen))
        state.tower = call
        if state.noted.encoded is not None:
            state.noted.encoded.append(call)

    def _end(self, tower: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        call = self.calls.state.tower
        if call is not None and call.rows is not None and out is not None:
            call.cost.tokens = self._projected(call.rows)
        if out is None or not self._projector_restores:
            self.calls.state.tower = None

    def _projected(self, rows: TowerRows) -> tuple[int, int]:
        """Number of rows that enter the projectors, without and with the stage."""
        layout, cells = self.layout, rows.cells
        if not isinstance(layout, DenseTower):
            return len(cells.members), len(rows.index) // cells.members.shape[1]
        every = cells.pictures * layout.projected(cells.modality)
        return every, len(rows.index) * cells.rows if self._projector_restores else every

    @compat.not_compiled
    def _embed(self, original: Callable[..., Any], pixels: Tensor) -> Any:
        """Embed only kept patches, if a stage before the first block has chosen them."""
        call = self.calls.state.tower
        rows = call.rows if call else None
        return original(pixels) if rows is None else rows.embedded(original, pixels)

    # -- blocks ---------------------------------------------------------------------------------

    def _block(self, i: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Arguments of block `i` for the kept rows."""
        call = self.calls.state.tower
        if call is None:
            return None
        kwargs = dict(kwargs)
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        if i == self.stage.block and call.rows is None:
            call.rows = kept_rows(call.cells, chosen_cells(call.cells, self.stage, hidden))
        if call.rows is None:
            bounds = kwargs.get("cu_seqlens")
            bounds = equal_bounds(*hidden.shape[:2]) if bounds is None else bounds
            call.cost.bounds.append((bounds, bounds))
            return None
        return call.rows.arguments(hidden, tuple(rest), kwargs, call.cost)

    def _hide_padding(self, attn: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hide the padding rows of pictures that keep fewer patches than others."""
        call = self.calls.state.tower
        rows = call.rows if call else None
        if not isinstance(rows, DenseRows) or rows.lengths is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        learnt = hidden.requires_grad or any(p.requires_grad for p in attn.parameters())
        noted = self.calls.state.noted  # within a checkpoint autograd may be off
        if noted.grad and learnt and checkpointed_since(self.layout.module):
            raise OptionError(
                f"gradient checkpointing with reducer {self.stage.reducer.name!r}: the backward "
                "pass would run blocks of the vision tower again, whose pictures keep different "
                "numbers of patches. Call gradient_checkpointing_disable() of the tower."
            )
        mask = rows.padding_mask(self.layout.module.config, hidden)
        return args[:1], {**kwargs, "attention_mask": mask}

    def _skip(
        self, original: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """An unused block returns its input."""
        if self.calls.state.tower is None:
            return original(hidden_states, *args, **kwargs)
        return hidden_states

    # -- full length ----------------------------------------------------------------------------

    def _restore(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """The output of a restoring module at full length."""
        call = self.calls.state.tower
        rows = call.rows if call else None
        if rows is None:
            return None
        if self._projector_restores:
            self.calls.state.tower = None
        return rows.restored(out)

    @compat.not_compiled
    def _project(
        self, layout: DenseTower, original: Callable[..., Tensor], x: Tensor, *args: Any
    ) -> Tensor:
        """Call a projector with zeros for NaN rows; then set tokens that read them to NaN.

        Gradients of its weights sum over all rows, and NaN · 0 is NaN.
        """
        if self.calls.state.disabled or not torch.is_grad_enabled():
            return original(x, *args)
        missing = x.isnan().any(-1)
        out = original(x.masked_fill(missing[..., None], 0.0), *args)
        return out.masked_fill(layout.missing_tokens(missing, out.shape[1])[..., None], torch.nan)


# -- what a plan needs in the tower --------------------------------------------------------------


# Bodies that have had a tower stage: features that lack tokens may still be passed in.
_HAD_STAGE: WeakSet[nn.Module] = WeakSet()


class TowerHooks:
    """Installs the hooks of tower stage and signals, and passes their records to prompts.

    Both write to one `TowerCall` per call of the tower. `had_stage`: whether features with dropped
    tokens may be passed in.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        self.adapter, self.calls = adapter, calls
        self.drop: TowerDrop | None = None
        self.probe: TowerProbe | None = None
        self.had_stage = adapter.body in _HAD_STAGE

    def install(self, plan: Plan) -> None:
        """Install the hooks that `plan` needs."""
        if plan.tower is not None:  # before the probe, which sees only kept rows
            _HAD_STAGE.add(self.adapter.body)
            self.had_stage = True
            self.drop = TowerDrop(self.adapter, self.calls, plan.tower)
            self.drop.install()
        signals = check_signals(plan, self.adapter)
        if signals:
            self.probe = TowerProbe(self.adapter, self.calls, signals, noted=self.drop is not None)
            self.probe.install()

    def remove(self) -> None:
        """Remove the hooks; safe to call twice."""
        for part in (self.drop, self.probe):
            if part is not None:
                part.remove()
        self.drop = self.probe = None

    def collect(self, call: Call, inputs: Mapping[str, Any]) -> None:
        """Note in a call, whose arguments are `inputs`, what was recorded for its prompt."""
        if self.probe is not None:
            layer, usual = inputs.get("vision_feature_layer"), self.adapter.feature_layer
            if layer is not None and layer != usual:
                raise OptionError(
                    f"vision_feature_layer={layer!r} in a call, but the config has {usual!r}, "
                    "whose blocks the reducer reads. Change the config before patch()."
                )
            call.tower_signals = self.probe.collect(call.spans)
        if self.drop is not None:
            self.drop.collect(call)
