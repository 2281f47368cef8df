"""The hooks that depend on the plan: on decoder layers, their attention, and the vision tower."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from tokencomp.adapters.base import Adapter
from tokencomp.engine import compat
from tokencomp.engine.forward import ForwardPass
from tokencomp.engine.layer_stages import scored_before, scored_layer
from tokencomp.engine.tap import attention_of
from tokencomp.engine.tower import TowerProbe, check_signals
from tokencomp.engine.tower_stage import TowerDrop
from tokencomp.engine.window import Windows
from tokencomp.plan import Plan
from tokencomp.signals import Attention

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class PlanHooks:
    """Installs and removes the hooks of one plan; they act on the forward pass that runs.

    Parameters
    ----------
    local
        State of the calling thread; `forward` is its forward pass, or None.
    off
        Whether compression is off in the calling thread.
    """

    def __init__(self, adapter: Adapter, local: Any, off: Callable[[], bool]) -> None:
        self.adapter, self.local, self.off = adapter, local, off
        self.tower: TowerProbe | None = None
        self.drop: TowerDrop | None = None
        self._handles: list[RemovableHandle] = []
        self._layered = False
        self._lock = threading.Lock()

    def install(self, plan: Plan) -> None:
        """Hook what the stages of `plan` need."""
        self._install_scores(plan)
        if plan.tower is not None:  # before the probe, which reads rows that are left
            self.drop = TowerDrop(self.adapter, plan.tower, self.off)
            self.drop.install()
        signals = check_signals(plan, self.adapter)
        if signals:
            full = self.drop.full_length if self.drop else None
            self.tower = TowerProbe(self.adapter, signals, self.off, full)
            self.tower.install()
        if plan.layer_stages:
            self.install_layers()

    def remove(self) -> None:
        """Undo `install` and `install_layers`; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layered = False
        for part in (self.drop, self.tower):
            if part is not None:
                part.remove()
        self.drop = self.tower = None

    def _install_scores(self, plan: Plan) -> None:
        for stage in plan.layer_stages:
            for signal in stage.reducer.needs if stage.most > 0 else ():
                if isinstance(signal, Attention) and scored_before(
                    signal, self.adapter, stage.layer
                ):
                    windows = Windows.of(self.adapter.decoder)
                    layer = scored_layer(windows, plan, stage.layer)
                    attn = attention_of(self.adapter.layers[layer])
                    score = functools.partial(self._attention, stage.layer, signal)
                    self._handles.append(attn.register_forward_hook(score, with_kwargs=True))

    def install_layers(self) -> None:
        """Hook every decoder layer, once: some hold other rows than the first.

        Entry plans pay for these hooks only when an earlier, staged patch left such a cache.
        """
        with self._lock:
            if self._layered:
                return
            self._layered = True
            for i, layer in enumerate(self.adapter.layers):
                hook = functools.partial(self._layer, i)
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _layer(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # Most decode steps end here: arguments change only where rows or masks differ by layer.
        if getattr(self.local, "forward", None) is None:
            return None
        return self._arguments(i, args, kwargs)

    @compat.not_compiled
    def _arguments(self, i: int, args: Any, kwargs: dict[str, Any]) -> Any:
        forward: ForwardPass = self.local.forward
        return forward.before_layer(i, args, kwargs)

    def _attention(
        self, stage: int, signal: Any, module: nn.Module, args: Any, kwargs: Any, out: Any
    ) -> None:
        if getattr(self.local, "forward", None) is not None:
            self._score(stage, signal, module, args, kwargs)

    @compat.not_compiled
    def _score(self, stage: int, signal: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        forward: ForwardPass = self.local.forward
        if forward.compresses:
            forward.score(stage, module, compat.bind(module, args, kwargs), signal)
