"""What depends on the plan: hooks on the vision tower and on decoder layers, rotary tables."""

from __future__ import annotations

from collections.abc import Callable

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call.layer_hooks import LayerHooks
from tokencomp.engine.call.rotary import SharedTables
from tokencomp.engine.call.state import RunningCalls
from tokencomp.engine.tower.signals import TowerProbe, check_signals
from tokencomp.engine.tower.stage import TowerDrop
from tokencomp.plan.plan import Plan


class PlanHooks:
    """Installs and removes what one plan needs inside of the tower and the decoder.

    Parameters
    ----------
    calls
        The forward pass of every thread.
    off
        Whether compression is off in the calling thread.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls, off: Callable[[], bool]) -> None:
        self.adapter, self.off = adapter, off
        self.layers = LayerHooks(adapter, calls)
        self.tables = SharedTables(adapter, calls)
        self.tower: TowerProbe | None = None
        self.drop: TowerDrop | None = None

    def install(self, plan: Plan) -> None:
        """Hook what the stages of `plan` need."""
        self.layers.install(plan)
        self.tables.install(plan)
        if plan.tower is not None:  # before the probe, which reads rows that are left
            self.drop = TowerDrop(self.adapter, plan.tower, self.off)
            self.drop.install()
        signals = check_signals(plan, self.adapter)
        if signals:
            full = self.drop.full_length if self.drop else None
            self.tower = TowerProbe(self.adapter, signals, self.off, full)
            self.tower.install()

    def remove(self) -> None:
        """Undo `install`; safe to call twice."""
        for part in (self.layers, self.tables, self.drop, self.tower):
            if part is not None:
                part.remove()
        self.drop = self.tower = None
