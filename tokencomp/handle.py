"""The handle of a patched model: a patch that can be changed, suspended and removed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from tokencomp.adapters.base import Adapter
from tokencomp.context_window import VisualContext, extend_visual_context, is_extended
from tokencomp.engine.checks import check_plan
from tokencomp.engine.hooks import CallGate, Hooks
from tokencomp.engine.stats import Stats
from tokencomp.engine.tower.signals import check_signals
from tokencomp.engine.weights import merging_where_possible
from tokencomp.errors import OptionError
from tokencomp.method import Method
from tokencomp.plan.options import Merging, in_words
from tokencomp.plan.plan import Plan, Stage
from tokencomp.reducers.base import Reducer, label
from tokencomp.reducers.plan_json import PlanLike, as_plan
from tokencomp.speed import fast_plan
from tokencomp.trained.cards import model_facts

# Attribute of a patched model with its handle: both are freed together, and it is in no state_dict.
ATTRIBUTE = "_tokencomp_handle"


def handle_of(model: nn.Module) -> Handle | None:
    """The patch of a model (without wrappers), if it has one."""
    handle: Handle | None = model.__dict__.get(ATTRIBUTE)
    return handle


def make_plan(spec: Method, adapter: Adapter) -> Plan:
    """The stages of a method in one decoder, with reducers that have loaded their weights."""
    num_layers = len(adapter.layers)
    if spec.speedup is None:
        plan = spec.stages(num_layers, adapter.first_layer_stage)
    else:
        plan = fast_plan(spec, adapter)
    plan.check(num_layers, adapter.first_layer_stage)
    check_plan(plan, adapter)
    check_signals(plan, adapter)
    if plan.may_merge:
        plan = merging_where_possible(plan, adapter)
    if plan.tower is not None:
        plan = Plan(plan.stages, adapter.tower_layout().fit(plan.tower, adapter.family))
    return plan.bind(model_facts(adapter))


class Handle:
    """A patch in force. Use as a context manager, or call `remove()`."""

    def __init__(
        self,
        hooks: Hooks,
        spec: Method,
        context: VisualContext | None = None,
        earlier: Handle | None = None,
    ) -> None:
        self._hooks, self._spec, self._context = hooks, spec, context
        self._earlier = earlier  # the patch to resume when a `with` block ends
        self._active = self._entered = False
        self._start()

    @property
    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        """A block in which no call runs; raises `ModelInUseError` if one does."""
        return CallGate.of(self._hooks.adapter.model).change()

    def __enter__(self) -> Handle:
        self._check_active()
        self._entered = True
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            earlier = self._earlier if self._active else None
            self.remove()
            if earlier is not None and earlier.suspended:
                earlier.resume()

    def remove(self) -> None:
        """Restore the model, see `unpatch`. Safe to call twice."""
        with self._lock:
            self._stop()
            self.suspended, self._earlier = False, None

    def _stop(self) -> None:
        if self._active:
            self._active = False
            self._hooks.remove()
            if self._context is not None:
                self._context.remove()
            del self._hooks.adapter.model.__dict__[ATTRIBUTE]

    def suspend(self) -> None:
        """Restore the model, until `resume` or `remove` is called."""
        with self._lock:
            if self._context is not None and not self._context.in_force:
                self._context = None  # undone, or replaced by another extension: not ours any more
            self._stop()
            self.suspended = True
            if not self._entered:  # else a chain of patches would keep all of them alive
                self._earlier = None

    def resume(self) -> None:
        """Patch the model again after `suspend`; the plan stays the same."""
        with self._lock:
            adapter, context = self._hooks.adapter, self._context
            if context is not None:
                free = not is_extended(adapter)
                target = context.target_tokens
                self._context = extend_visual_context(adapter.model, target) if free else None
            self._start()

    def _start(self) -> None:
        self._active, self.suspended = True, False
        self._hooks.adapter.model.__dict__[ATTRIBUTE] = self
        try:
            self._hooks.install()
        except BaseException:  # without a handle nobody could remove the hooks installed so far
            self.remove()
            raise

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run new prompts uncompressed inside the block, in this thread."""
        state = self._hooks.calls.state  # of this thread
        state.disabled += 1
        try:
            yield
        finally:
            state.disabled -= 1

    def set(
        self,
        *,
        ratio: float | Mapping[str, float] | None = None,
        budget: int | Mapping[str, int] | None = None,
        speedup: float | None = None,
        reducer: str | Reducer | None = None,
        plan: PlanLike | None = None,
        merge: Merging | None = None,
        tower_ratio: float | Literal["auto"] | None = None,
        tower_reducer: str | Reducer | None = None,
        **options: Any,
    ) -> Handle:
        """Change ratios, reducers or options in place; omitted arguments keep their values.

        `options` are further options of the stages, and those of the reducer, as in `patch`. A
        ratio, a budget and a speedup replace one another. Another reducer starts from its default
        options, and `merge` from False if it merges by itself or the value was "auto". An earlier
        tower ratio is at most a new ratio, and off next to a budget or speedup. A plan replaces
        everything; after a plan, a new ratio needs a reducer too.
        """
        changes = {
            "ratio": ratio, "budget": budget, "speedup": speedup, "reducer": reducer,
            "tower_ratio": tower_ratio, "tower_reducer": tower_reducer,
            "plan": None if plan is None else as_plan(plan),
            "options": {**options, "merge": merge},
        }  # fmt: skip
        return self.change(self._spec.override(changes))

    def change(self, spec: Method) -> Handle:
        """Change to a ready method in place."""
        with self._lock:
            self._check_active()
            new_plan = make_plan(spec, self._hooks.adapter)
            self._spec = spec
            try:
                self._hooks.change(new_plan)
            except BaseException:  # without all its hooks the patch would run something else
                self.remove()
                raise
        return self

    def _check_active(self) -> None:
        if not self._active:
            raise OptionError(
                "this handle was removed, or replaced by a later patch; call "
                "tokencomp.patch(model, ...) again."
            )

    @property
    def plan(self) -> Plan:
        """The stages in force."""
        return self._hooks.decoder.plan

    @property
    def compresses(self) -> bool:
        """Whether prompts with media are compressed in the calling thread."""
        return self._hooks.decoder.compresses()

    @property
    def compact(self) -> bool:
        """Whether positions count the kept tokens only."""
        return self._hooks.compact_positions

    @property
    def stats(self) -> Stats:
        """Counts of the last compressed prompt, in any thread.

        Empty, and False as a boolean, before the first prompt, after `set`, after a prompt without
        visual input, and at ratio 0, where no hooks run. The `requested_ratio` is 0 then, too,
        because a budget or a ratio by modality has a ratio only for given media; `repr(handle)`
        shows the setting. Prompts under `disabled()` change nothing.
        `tokencomp.inputs.prompts.prompt_lengths(model, inputs)` counts the tokens of a prompt.
        """
        decoder = self._hooks.decoder
        return decoder.stats or Stats.empty(decoder.adapter.text_config, decoder.plan.active)

    def __repr__(self) -> str:
        family = self._hooks.adapter.family
        spec = self._spec
        asked = "plan" if spec.plan is not None else spec.asked
        places = _places(self.plan.stages)
        if tower := self.plan.tower:
            places.insert(0, f"{label(tower.reducer)} before tower block {tower.block}")
        how = f" ({', '.join(places)})" if places else ""
        state = self.stats if self._active else "removed"
        return f"<tokencomp.Handle {family}, {asked}{how}: {state}>"


def _places(stages: Sequence[Stage]) -> list[str]:
    """Which reducers act where, e.g. "bipartite at entry", "prune before layers 4, 8"."""
    by_name: dict[str, list[int]] = {}
    for stage in stages:
        words = ", ".join([label(stage.reducer), *in_words(stage.stage_options)])
        by_name.setdefault(f"{words}," if ", " in words else words, []).append(stage.layer)
    places = []
    for name, layers in by_name.items():
        entry, later = layers[0] == 0, [str(layer) for layer in layers if layer]
        parts = ["at entry"] if entry else []
        parts += [f"before layer{'s' * (len(later) > 1)} {', '.join(later)}"] if later else []
        places.append(f"{name} {' and '.join(parts)}")
    return places
