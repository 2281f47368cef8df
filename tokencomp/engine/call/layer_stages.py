"""Between which decoder layers tokens may leave, and whose attention scores them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokencomp.adapters.base import Adapter
from tokencomp.engine.layer_types.types import LayerTypes
from tokencomp.engine.scores.capture import attention_of
from tokencomp.errors import PlanError, UnsupportedModelError
from tokencomp.plan.plan import Plan
from tokencomp.tokens.signals import Attention
from tokencomp.torchlib import compat

STREAMS = "its hidden states have several streams"
# Of these, why the first layer cannot score tokens at entry either.
UNSCORED = {
    STREAMS: "takes hidden states of several streams, made of the embeddings behind that stage",
}
# Options of text configs whose decoders tokens cannot leave between layers, if they are above a
# number.
ENTRY_ONLY = {
    "altup_num_inputs": (1, STREAMS),
    "hc_mult": (1, STREAMS),
    "n_layers_per_attn_res_block": (0, "its layers read the states of blocks before them, too"),
    "indexer_compress_ratio": (1, "its indexer pools blocks of rows"),
}
FIX = "Use a reducer that acts at entry, such as 'condiv', 'divprune' or 'bipartite'."


def check_entry(plan: Plan, adapter: Adapter) -> None:
    """Refuse an entry stage whose reducer reads attention that the first layer does not have.

    Raises
    ------
    PlanError
        Tokens would be scored by layer 0, which is a layer of linear attention, for example, or
        takes what `UNSCORED` names.
    """
    entry = plan.entry
    if entry is None or not any(isinstance(signal, Attention) for signal in entry.needs):
        return
    try:
        why = [UNSCORED[r] for r in _entry_only(adapter.decoder) if r in UNSCORED]
        if why:
            raise UnsupportedModelError(
                f"{type(adapter.layers[0]).__name__} {why[0]}. Use a reducer without attention, "
                "such as 'divprune'."
            )
        attention_of(adapter.layers[0])
    except UnsupportedModelError as error:
        raise PlanError(
            f"reducer {entry.reducer.name!r} scores tokens at entry by the attention of the "
            f"first decoder layer: {error}"
        ) from None


def _entry_only(decoder: Any) -> list[str]:
    """Why tokens cannot leave between the layers of a decoder; empty if they can."""
    return [
        reason
        for name, (limit, reason) in ENTRY_ONLY.items()
        if any((value or 0) > limit for value in compat.layer_values(decoder.config, name))
    ]


def check_modalities(plan: Plan, adapter: Adapter) -> None:
    """Refuse fractions of modalities that the model does not take.

    Raises
    ------
    PlanError
        A stage would treat such a kind in a way of its own, to no effect.
    """
    modalities = {modality for s in plan.stages for modality, f in s.by_modality if f != s.fraction}
    if modalities and (unused := modalities - adapter.media):
        raise PlanError(
            f"a ratio of {', '.join(sorted(unused))} has no effect: {adapter.family} takes "
            f"{' and '.join(sorted(adapter.media))} only. Leave it out. (Where frames of a video "
            "stand at placeholders of images, they count as images.)"
        )


def check_layer_stages(plan: Plan, adapter: Adapter) -> None:
    """Refuse stages between layers that the decoder does not allow, or that nothing can score.

    Raises
    ------
    PlanError
        The model is served at entry only, a later layer reads the keys of one before a stage, or
        its choice of rows, or no layer before a stage has attention that could score for it.
    """
    decoder, layers = adapter.decoder, [stage.layer for stage in plan.layer_stages]
    if not layers:
        return
    if not adapter.layer_stages:
        raise PlanError(
            f"stages at layers {layers}: {adapter.family} is served at entry only. {FIX}"
        )
    why = _entry_only(decoder)
    if why:
        raise PlanError(
            f"stages at layers {layers}: {type(decoder).__name__} is served at entry only, because "
            f"{why[0]}. {FIX}"
        )
    choosers = list(getattr(decoder.config, "indexer_types", None) or ())
    follow = [layer for layer in layers if choosers[layer : layer + 1] == ["shared"]]
    if follow:
        raise PlanError(
            f"stages at layers {follow}: these layers of {type(decoder).__name__} attend to the "
            "rows that the indexer of a layer before has chosen, by number, and must hold the same "
            'rows. Choose layers whose entry in indexer_types of the config is "full", or a '
            "reducer that acts at entry."
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
    for stage, layer, _ in scored_stages(plan, adapter):
        try:
            attention_of(adapter.layers[layer])
        except UnsupportedModelError as error:
            raise PlanError(
                f"a stage at layer {stage} is to be scored by layer {layer}: {error}"
            ) from None


def scored_stages(plan: Plan, adapter: Adapter) -> Iterator[tuple[int, int, Attention]]:
    """Stages that a layer before them scores for: layer of the stage, that layer, and the signal.

    Raises
    ------
    PlanError
        No layer before a stage has attention.
    """
    layer_types = LayerTypes.of(adapter.decoder)
    for stage in plan.layer_stages:
        for signal in stage.needs if stage.most > 0 else ():
            if isinstance(signal, Attention) and _scored_before(signal, adapter, stage.layer):
                yield stage.layer, _scored_layer(layer_types, plan, stage.layer), signal


def _scored_before(signal: Attention, adapter: Adapter, stage: int) -> bool:
    """Whether a layer before the stage scores for it, and not layer `stage` itself.

    That is so where the signal says it, and where layer `stage` has no attention.
    """
    if signal.layer == "previous":
        return True
    try:
        attention_of(adapter.layers[stage])
    except UnsupportedModelError:
        return True
    return False


def _scored_layer(layer_types: LayerTypes, plan: Plan, stage: int) -> int:
    """The layer whose attention scores tokens for the stage before layer `stage`.

    It is the last one before the stage, and behind the stage before, whose queries see all tokens;
    where there is none, the last with a window, whose scores say what attention each token would
    receive if all were visible. Layers of linear attention have no scores: where nothing else lies
    between two stages, the second goes by a layer before the first, too.

    Raises
    ------
    PlanError
        No layer before the stage has attention.
    """
    types = layer_types.types
    behind = max((s.layer for s in plan.stages if s.layer < stage), default=0)
    for first in (behind, 0):
        scoring = [i for i in range(first, stage) if types[i].attends]
        whole = [i for i in scoring if types[i].window_field is None]
        if scoring:
            return (whole or scoring)[-1]
    scored = (i for i, one in enumerate(types) if one.attends)
    raise PlanError(
        f"a stage at layer {stage} is to be scored by the attention of a layer before it, but none "
        f"of the layers 0 to {stage - 1} has attention. The first that has is layer "
        f"{next(scored, None)}. Choose layers behind it, or a reducer without attention, such as "
        "'divprune'."
    )
