"""`patch`, `unpatch` and the handle between them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from tokencomp.adapters.base import Adapter, adapter_for, unwrap
from tokencomp.context_window import (
    VISUAL_WINDOW,
    VisualContext,
    extend_visual_context,
    restore_visual_context,
)
from tokencomp.errors import AlreadyCompressedError, OptionError
from tokencomp.hooks import Hooks
from tokencomp.plan import Plan, check_ratio
from tokencomp.proportional import check_merges
from tokencomp.reducers.base import Reducer, check_choice, make_reducer
from tokencomp.stats import Stats

DEFAULT_REDUCER = "condiv"  # chosen on validation: benchmarks/accuracy/CHOICE.md
_HANDLES: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()


def patch(
    model: nn.Module,
    ratio: float = 0.5,
    *,
    reducer: str | Reducer = "auto",
    plan: Plan | None = None,
    strict: bool = False,
    positions: Literal["original", "compact"] = "original",
    extend_context: bool | int = False,
    proportional_attention: bool = False,
    **options: Any,
) -> Handle:
    """Compress the visual tokens of every later forward and generate call of `model`.

    Parameters
    ----------
    model
        A Hugging Face multimodal model (PEFT and torch.compile wrappers are looked through). Its
        weights, config, class and attention backend are left alone.
    ratio
        Fraction of visual-token work removed from the LLM, in [0, 1): 1 - mean over decoder layers
        of visual tokens seen / visual tokens of the prompt. 0 = off.
    reducer
        A name from `tokencomp.available_reducers()`, a `Reducer`, or "auto".
    plan
        Stages made by hand, instead of `ratio` and `reducer`.
    strict
        Refuse prompts without visual input instead of passing them through.
    positions
        "original": kept tokens keep the positions of the full prompt, so that dropping equals
        masking. "compact": kept tokens are renumbered without gaps, as serving engines do for
        models with one position per token (refused for M-RoPE models, whose engine path keeps the
        original positions too).
    extend_context
        Stretch the visual context window (`tokencomp.extend_visual_context`) for this many visual
        tokens of the uncompressed prompt; True: four times LLaVA-OneVision's 6272.
    proportional_attention
        Let a merged token weigh as much as the tokens it stands for (log size is added to the
        attention logits), for reducers that merge. Your attention backend does the adding, on a
        few more head dimensions; the cache does not grow. Scores for pruning are taken without.
    **options
        Options of the named reducer.

    Returns
    -------
    Handle
        Undo with `handle.remove()`, `tokencomp.unpatch(model)`, or by leaving a `with` block.
        Patching a patched model replaces the earlier patch.

    Raises
    ------
    RatioError, UnknownNameError, OptionError
        A bad ratio, reducer name, reducer option or `positions`; proportional attention for a
        reducer that merges nothing.
    UnsupportedModelError
        No adapter serves the model.
    AlreadyCompressedError
        The model carries another method's changes.
    """
    adapter = adapter_for(model)
    base = adapter.model
    _refuse_foreign(base)
    check_choice("patch", "positions", positions, ("original", "compact"))
    if positions == "compact" and adapter.mrope:
        raise OptionError(
            f"positions='compact': {adapter.family} has three rows of positions (time, height, "
            "width), which cannot be renumbered without losing the grid. Leave it at 'original'."
        )
    ready = _make_plan(plan, ratio, reducer, options, adapter, proportional_attention)
    if base in _HANDLES:
        _HANDLES[base].remove()
    context = None
    if extend_context is not False:
        target = 4 * VISUAL_WINDOW if extend_context is True else extend_context
        context = extend_visual_context(base, target)
    hooks = Hooks(adapter, ready, strict, positions == "compact", proportional_attention)
    handle = Handle(hooks, ratio, reducer, options, context)
    _HANDLES[base] = handle
    return handle


def unpatch(model: nn.Module) -> None:
    """Undo `patch(model)` and `extend_visual_context(model, ...)`, if they were called."""
    base = unwrap(model)
    if base in _HANDLES:
        _HANDLES[base].remove()
    restore_visual_context(base)


class Handle:
    """A patch in force. Use as a context manager, or call `remove()`."""

    def __init__(
        self,
        hooks: Hooks,
        ratio: float,
        reducer: str | Reducer,
        options: dict[str, Any],
        context: VisualContext | None = None,
    ) -> None:
        self._hooks, self._context = hooks, context
        self._request = (ratio, reducer, options)
        self._active = True
        hooks.install()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model. Safe to call twice."""
        if self._active:
            self._active = False
            self._hooks.remove()
            if self._context is not None:
                self._context.remove()
            _HANDLES.pop(self._hooks.adapter.model, None)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run new prompts uncompressed inside the block, in this thread."""
        self._hooks.disable(1)
        try:
            yield
        finally:
            self._hooks.disable(-1)

    def set(
        self,
        *,
        ratio: float | None = None,
        reducer: str | Reducer | None = None,
        plan: Plan | None = None,
        **options: Any,
    ) -> Handle:
        """Change ratio, reducer or options in place; what is not given stays.

        A new reducer starts from its own default options.
        """
        if not self._active:
            raise OptionError("this handle was removed; call tokencomp.patch(model, ...) again.")
        old_ratio, old_reducer, old_options = self._request
        merged = {**(old_options if reducer is None else {}), **options}
        request = (
            old_ratio if ratio is None else ratio,
            old_reducer if reducer is None else reducer,
            merged,
        )
        proportional = self._hooks.proportional is not None
        ready = _make_plan(plan, *request, self._hooks.adapter, proportional)
        self._request = request
        self._hooks.remove()
        self._hooks.plan = ready
        self._hooks.install()
        return self

    @property
    def plan(self) -> Plan:
        """The stages in force."""
        return self._hooks.plan

    @property
    def stats(self) -> Stats | None:
        """Counts of the last compressed prefill; None before the first."""
        return self._hooks.stats

    def __repr__(self) -> str:
        family = self._hooks.adapter.family
        state = "active" if self._active else "removed"
        stages = ", ".join(f"{s.reducer.name}@{s.layer}→{s.fraction:.3g}" for s in self.plan.stages)
        return f"<tokencomp.Handle {family}: {stages or 'off'} ({state})>"


def _make_plan(
    plan: Plan | None,
    ratio: float,
    reducer: str | Reducer,
    options: dict[str, Any],
    adapter: Adapter,
    proportional: bool,
) -> Plan:
    num_layers = len(adapter.layers)
    made: Reducer | None = None
    if plan is None:
        ratio = check_ratio(ratio)
        made = make_reducer(DEFAULT_REDUCER if reducer == "auto" else reducer, **options)
        plan = made.plan(ratio, num_layers).not_before(adapter.first_layer_stage, num_layers)
    if proportional:
        check_merges(plan, made)
    plan.check(num_layers, adapter.first_layer_stage)
    return plan.for_model(adapter.model)


def _refuse_foreign(model: nn.Module) -> None:
    """Look for what other methods leave on a model."""
    config = getattr(model, "config", None)
    found = [
        name
        for name in ("fastv_config", "use_fast_v", "video_pruning_rate", "image_pruning_rate")
        if getattr(config, name, None)
    ]
    found += [name for name in ("_info", "_tome_info") if name in model.__dict__]
    for name in ("get_image_features", "get_video_features", "forward"):
        for module in (model, getattr(model, "model", None)):
            here = getattr(module, "__dict__", {})
            accelerated = name == "forward" and "_old_forward" in here
            if name in here and not accelerated:
                found.append(f"{type(module).__name__}.{name} replaced")
    if found:
        raise AlreadyCompressedError(
            f"{type(model).__name__} carries another method's changes ({', '.join(found)}). "
            "Load a fresh model, or undo the other method first."
        )
