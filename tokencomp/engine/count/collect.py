"""Takes the counts of a prefill from its finished forward pass."""

from __future__ import annotations

from typing import Any

from tokencomp.engine.cache.rows import first_with_rows
from tokencomp.engine.count.stats import Stats
from tokencomp.engine.stage.forward import ForwardPass


def collect(forward: ForwardPass, cache: Any) -> Stats:
    """Stats of a finished forward pass; what follows from the config and the plan comes later."""
    layer = first_with_rows(getattr(cache, "layers", None))
    keys = layer.keys if layer is not None else None
    if keys is None:
        keys = next(forward.adapter.decoder.parameters())
    return Stats(
        spans=forward.spans,
        counts=forward.counts,
        lengths=forward.lengths,
        prompts=forward.prompts,
        past=forward.segments[0].logical,
        past_rows=[s.physical for s in forward.segments for _ in range(s.first, s.stop)],
        reduce_seconds=forward.reduce_seconds,
        prefill_chunk=forward.chunk,
        tower_costs=forward.tower_costs,
        _config=forward.adapter.text_config,
        _itemsize=keys.element_size(),
        _plan=forward.plan,
        _places=forward.places,
        _survivors=forward.survivors,
        _kept=forward.kept,
    )
