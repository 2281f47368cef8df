"""What a plan needs in the vision tower: its stage there, and signals for reducers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

from torch import nn

from tokencomp.adapters.base import Adapter
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.engine.tower.signals import TowerProbe, check_signals
from tokencomp.engine.tower.stage import TowerDrop
from tokencomp.errors import OptionError
from tokencomp.plan.plan import Plan

# Bodies that have had a tower stage: their features may come later, with tokens missing.
_HAD_STAGE: WeakSet[nn.Module] = WeakSet()


class TowerHooks:
    """Installs and removes them, and gives a prompt what was noted in the calls of the tower.

    Parameters
    ----------
    off
        Whether compression is off in the calling thread.

    Attributes
    ----------
    had_stage
        Whether features may come in which a stage has left tokens out.
    """

    def __init__(self, adapter: Adapter, off: Callable[[], bool]) -> None:
        self.adapter, self.off = adapter, off
        self.drop: TowerDrop | None = None
        self.probe: TowerProbe | None = None
        self.had_stage = adapter.body in _HAD_STAGE

    def install(self, plan: Plan) -> None:
        """Hook what `plan` needs."""
        if plan.tower is not None:  # before the probe, which reads rows that are left
            _HAD_STAGE.add(self.adapter.body)
            self.had_stage = True
            self.drop = TowerDrop(self.adapter, plan.tower, self.off)
            self.drop.install()
        signals = check_signals(plan, self.adapter)
        if signals:
            full = self.drop.full_length if self.drop else None
            self.probe = TowerProbe(self.adapter, signals, self.off, full)
            self.probe.install()

    def remove(self) -> None:
        """Undo `install`; safe to call twice."""
        for part in (self.drop, self.probe):
            if part is not None:
                part.remove()
        self.drop = self.probe = None

    def collect(self, forward: ForwardPass, inputs: Mapping[str, Any]) -> None:
        """Give a forward pass what was noted for its prompt.

        Raises
        ------
        OptionError
            The call, whose `inputs` these are, chose another layer of the tower than its config.
        """
        if self.probe is not None:
            layer, own = inputs.get("vision_feature_layer"), self.adapter.feature_layer
            if layer is not None and layer != own:
                raise OptionError(
                    f"vision_feature_layer={layer!r} in a call, but the config has {own!r}, whose "
                    "blocks the reducer reads. Change the config before patch()."
                )
            forward.tower = self.probe.collect(forward.spans)
        if self.drop is not None:
            media = {s.modality for row in forward.spans for s in row} - {"audio"}
            forward.tower_costs = self.drop.collect(len(media))
