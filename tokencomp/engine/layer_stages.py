"""Between which decoder layers tokens may leave, and whose attention scores them."""

from __future__ import annotations

from typing import Any

from tokencomp.adapters.base import Adapter
from tokencomp.engine import compat
from tokencomp.engine.tap import attention_of
from tokencomp.engine.window import (
    CHUNKED,
    FULL,
    INDEXED,
    LINEAR,
    SLIDING,
    WITHOUT_ATTENTION,
    Windows,
)
from tokencomp.errors import PlanError, UnsupportedModelError
from tokencomp.plan import Plan
from tokencomp.signals import Attention

# Options of text configs whose decoders tokens cannot leave between layers.
ENTRY_ONLY = {
    "altup_num_inputs": "its hidden states have several streams",
    "hc_mult": "its hidden states have several streams",
    "indexer_compress_ratio": "its indexer pools blocks of rows",
}
FIX = "Use a reducer that acts at entry, such as 'condiv', 'divprune' or 'merge'."


def check_entry(plan: Plan, adapter: Adapter) -> None:
    """Refuse an entry stage whose reducer reads attention that the first layer does not have.

    Raises
    ------
    PlanError
        Tokens would be scored by layer 0, which is a layer of linear attention, for example.
    """
    entry = plan.entry
    if entry is None or not any(isinstance(signal, Attention) for signal in entry.reducer.needs):
        return
    try:
        attention_of(adapter.layers[0])
    except UnsupportedModelError as error:
        raise PlanError(
            f"reducer {entry.reducer.name!r} scores tokens at entry by the attention of the "
            f"first decoder layer: {error}"
        ) from None


def check_layer_stages(plan: Plan, adapter: Adapter) -> None:
    """Refuse stages between layers that the decoder does not allow, or that nothing can score.

    Raises
    ------
    PlanError
        The model is served at entry only, a later layer reads the keys of one before a stage, or
        no layer before a stage has attention that could score for it.
    """
    decoder, layers = adapter.decoder, [stage.layer for stage in plan.layer_stages]
    if not layers:
        return
    if not adapter.layer_stages:
        raise PlanError(
            f"stages at layers {layers}: {adapter.family} is served at entry only. {FIX}"
        )
    why = [w for name, w in ENTRY_ONLY.items() if (getattr(decoder.config, name, 1) or 1) > 1]
    if why:
        raise PlanError(
            f"stages at layers {layers}: {type(decoder).__name__} is served at entry only, because "
            f"{why[0]}. {FIX}"
        )
    modes = compat.kv_sharing_modes(decoder.config)
    shared = any(str(mode).startswith("reuse") for mode in modes)
    last = modes.index("store") if shared else len(decoder.layers)
    late = [layer for layer in layers if layer > last]
    if late:
        raise PlanError(
            f"stages at layers {late}: later layers of {type(decoder).__name__} read the keys of "
            f"layer {last}, and must hold the same tokens. Choose layers up to {last}, or a "
            "reducer that acts at entry."
        )
    windows = Windows.of(decoder)
    for stage in plan.layer_stages:
        for signal in stage.reducer.needs if stage.fraction > 0 else ():
            if isinstance(signal, Attention) and signal.layer == "previous":
                scored_layer(windows, plan, stage.layer)
            elif isinstance(signal, Attention):
                _check_attention(adapter.layers[stage.layer], stage.layer)


def scored_layer(windows: Windows, plan: Plan, stage: int) -> int:
    """The layer whose attention scores tokens for the stage before layer `stage`.

    It is the last one before the stage, and behind the stage before, whose queries see all tokens;
    where there is none, the last with a window, whose scores say what attention each token would
    receive if all were visible. Layers of linear attention have no scores.

    Raises
    ------
    PlanError
        There is none behind the stage before.
    """
    first = max((s.layer for s in plan.stages if s.layer < stage), default=0)
    kinds = windows.kinds
    for usable in ((FULL, INDEXED), (SLIDING, CHUNKED)):
        layers = [i for i in range(first, stage) if kinds[i] in usable]
        if layers:
            return layers[-1]
    allowed = [i + 1 for i, kind in enumerate(kinds) if kind not in LINEAR | WITHOUT_ATTENTION]
    raise PlanError(
        f"a stage at layer {stage} is to be scored by the attention of a layer before it, but none "
        f"of the layers {first} to {stage - 1} has attention. The layers behind those that have "
        f"are {', '.join(map(str, allowed))}. Choose among them, or a reducer without attention, "
        "such as 'divprune'."
    )


def _check_attention(layer: Any, number: int) -> None:
    try:
        attention_of(layer)
    except UnsupportedModelError as error:
        raise PlanError(f"a stage at layer {number} is to be scored there: {error}") from None
