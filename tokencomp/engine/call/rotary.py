"""The rotary tables of the decoder, computed once where scores at entry have needed them before."""

from __future__ import annotations

from typing import Any

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call.state import RunningCalls
from tokencomp.plan.plan import Plan
from tokencomp.tokens.signals import Attention
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import Hooked, MethodReplacement


class SharedTables(Hooked):
    """Gives the decoder the tables with which the entry stage has scored the prompt.

    An entry of a table depends on its own position alone, so that the columns which are left of
    these tables equal what the decoder would compute anew. No hook can leave a call out. Therefore
    `forward` of the rotary module is replaced, and only under plans that score tokens at entry.

    Parameters
    ----------
    calls
        The forward pass of every thread.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls) -> None:
        self.adapter, self.calls = adapter, calls

    def install(self, plan: Plan) -> None:
        """Replace `forward`, if the entry stage of `plan` computes tables."""
        needs = plan.entry.reducer.needs if plan.entry is not None else ()
        if self.adapter.rotary is not None and any(isinstance(s, Attention) for s in needs):
            replaced = MethodReplacement(self.adapter.rotary, "forward", self._forward)
            self._handles.append(replaced)

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        tables = None
        if self.calls.running.forward is not None:
            tables = self._tables(args, kwargs)
        return original(*args, **kwargs) if tables is None else tables

    @compat.not_compiled
    def _tables(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tables of the entry stage; None if the call asks for others, as a chunk does."""
        forward: Any = self.calls.running.forward  # set, as the caller has seen
        arguments = compat.bind(self.adapter.rotary, args, kwargs)
        positions = arguments.get("position_ids")
        if positions is None or positions.shape[-1] != forward.layout.width:
            return None
        return forward.tables.get(arguments.get("layer_type"))
