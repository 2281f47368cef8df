"""Refusals: when a model is patched, before a prompt runs, and while it runs.

`PLAN_CHECKS` and `PROMPT_CHECKS` list checks of a plan and of a prompt; each list is
evaluated completely before anything is changed or computed. The functions at the end check facts
that are known only during the call. Other modules refuse their arguments themselves.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.cache_utils import StaticLayer

from tokencomp.adapters.base import Adapter
from tokencomp.engine.cache import DYNAMIC, CompressedLayer, is_reference
from tokencomp.engine.call import Call, Noted, Segment
from tokencomp.engine.capture import attention_of
from tokencomp.engine.layer_types import LayerTypes
from tokencomp.errors import (
    NoVisualInputError,
    OptionError,
    PlanError,
    RowIndexedAttentionError,
    SpanError,
    UncompressedWarning,
    UnknownGridError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from tokencomp.plan.plan import Plan
from tokencomp.tokens.signals import SEEN, Attention
from tokencomp.torchlib import compat
from tokencomp.torchlib.cache_classes import QUANTIZED, WITHOUT_ROWS
from tokencomp.torchlib.checkpointing import checkpointed_since

TRACED = (
    "a prompt with media was traced (torch.export, torch.jit.trace, torch.func). Which tokens it "
    "keeps follows from their values, so that no trace holds for other prompts. Use torch.compile, "
    "or trace under handle.disabled()."
)

STREAMS = "its hidden states have several streams"
# Fields of text configs: above this value, no token can be dropped between layers.
ENTRY_ONLY = {
    "altup_num_inputs": (1, STREAMS),
    "hc_mult": (1, STREAMS),
    "n_layers_per_attn_res_block": (0, "its layers read the states of blocks before them, too"),
    "indexer_compress_ratio": (1, "its indexer pools blocks of rows"),
}
FIX = "Use a reducer that acts at entry, such as 'condiv', 'divprune' or 'bipartite'."


# -- before a model is patched ------------------------------------------------------------------


CHECKPOINTED = "_checkpoint_wrapped_module."
"""Before the names of modules within torch's `CheckpointWrapper`."""


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """Modules of a decoder that compute rotary tables, recognised by their inverse frequencies.

    A module inside a layer, or in a list with one per layer, is refused.
    """
    found = {
        name: module
        for name, module in decoder.named_modules()
        if any("inv_freq" in buffer for buffer, _ in module.named_buffers(recurse=False))
    }
    if nested := [name for name in found if "." in name.removeprefix(CHECKPOINTED)]:
        raise UnsupportedModelError(
            f"the layers of {type(decoder).__name__} take rotary tables of {nested[0]}. Served are "
            "text decoders whose rotary modules are attributes of the decoder, such as rotary_emb. "
            "Run it without patch()."
        )
    return list(found.values())


def check_entry(plan: Plan, adapter: Adapter) -> None:
    """Refuse an entry stage whose reducer needs attention scores that layer 0 cannot provide."""
    entry = plan.entry
    if entry is None or not any(isinstance(signal, Attention) for signal in entry.needs):
        return
    layer = adapter.layers[0]
    what = (
        f"reducer {entry.reducer.name!r} scores tokens at entry by the attention of the first "
        "decoder layer"
    )
    if STREAMS in _entry_only(adapter.decoder):
        raise PlanError(
            f"{what}: {type(layer).__name__} takes hidden states of several streams, made of the "
            "embeddings after that stage. Use a reducer without attention, such as 'divprune'."
        )
    _check_attention(layer, what)


def _check_attention(layer: nn.Module, what: str) -> None:
    """Refuse to score tokens by a layer without attention whose queries and keys are known."""
    try:
        attention_of(layer)
    except UnsupportedModelError as error:
        raise PlanError(f"{what}: {error}") from None


def _entry_only(decoder: Any) -> list[str]:
    """Why tokens cannot be dropped between the layers of a decoder; empty if they can."""
    return [
        reason
        for name, (limit, reason) in ENTRY_ONLY.items()
        if any((value or 0) > limit for value in compat.layer_values(decoder.config, name))
    ]


def check_modalities(plan: Plan, adapter: Adapter) -> None:
    """Refuse ratios of modalities that the model does not take (`PlanError`)."""
    modalities = {modality for s in plan.stages for modality, f in s.by_modality if f != s.fraction}
    if modalities and (unused := modalities - adapter.media):
        raise PlanError(
            f"a ratio of {', '.join(sorted(unused))} has no effect: {adapter.family} takes "
            f"{' and '.join(sorted(adapter.media))} only. Leave it out. (Video frames at "
            "placeholders of images count as images.)"
        )


def check_layer_stages(plan: Plan, adapter: Adapter) -> None:
    """Refuse stages between layers where the decoder does not allow them."""
    decoder, layers = adapter.decoder, [stage.layer for stage in plan.layer_stages]
    if not layers:
        return
    only = [] if adapter.layer_stages else [f"{adapter.family} is served at entry only"]
    name = type(decoder).__name__
    only += [f"{name} is served at entry only, because {why}" for why in _entry_only(decoder)]
    if only:
        raise PlanError(f"stages at layers {layers}: {only[0]}. {FIX}")
    # Layers that share the selection of an indexer read it by row number.
    choosers = list(getattr(decoder.config, "indexer_types", None) or ())
    follow = [layer for layer in layers if choosers[layer : layer + 1] == ["shared"]]
    if follow:
        raise PlanError(
            f"stages at layers {follow}: these layers of {name} attend to the "
            "rows that the indexer of a layer before has chosen, by number, and must hold the same "
            'rows. Choose layers whose entry in indexer_types of the config is "full", or a '
            "reducer that acts at entry."
        )
    # Layers that reuse keys of an earlier layer (Gemma 3n, Gemma 4) must hold the same rows.
    modes = compat.kv_sharing_modes(decoder.config)
    shared = any(str(mode).startswith("reuse") for mode in modes)
    last = modes.index("store") if shared else len(decoder.layers)
    late = [layer for layer in layers if layer > last]
    if late:
        raise PlanError(
            f"stages at layers {late}: later layers of {name} read the keys of "
            f"layer {last}, and must hold the same tokens. Choose layers up to {last}, or a "
            "reducer that acts at entry."
        )
    for stage, layer, _ in scored_stages(plan, adapter):
        what = f"a stage at layer {stage} is to be scored by layer {layer}"
        _check_attention(adapter.layers[layer], what)


def scored_stages(plan: Plan, adapter: Adapter) -> Iterator[tuple[int, int, Attention]]:
    """Stages scored by an earlier layer: layer of the stage, scoring layer, and signal."""
    layer_types = LayerTypes.of(adapter.decoder)
    for stage in plan.layer_stages:
        for signal in stage.needs if stage.most > 0 else ():
            if isinstance(signal, Attention) and _scored_before(signal, adapter, stage.layer):
                yield stage.layer, _scored_layer(layer_types, plan, stage.layer), signal


def _scored_before(signal: Attention, adapter: Adapter, stage: int) -> bool:
    """Whether an earlier layer scores: the signal asks for it, or layer `stage` lacks attention."""
    if signal.layer == "previous":
        return True
    try:
        attention_of(adapter.layers[stage])
    except UnsupportedModelError:
        return True
    return False


def _scored_layer(layer_types: LayerTypes, plan: Plan, stage: int) -> int:
    """The layer whose attention scores tokens for the stage before layer `stage`.

    The last layer with full attention between the previous stage and this one; else the last with a
    window, whose scores are computed as if all tokens were visible. If all layers between two
    stages have linear attention, a layer before the first stage scores for both.
    """
    types = layer_types.types
    # Layers since the previous stage see the same rows as this stage.
    previous = max((s.layer for s in plan.stages if s.layer < stage), default=0)
    for first in (previous, 0):
        scoring = [i for i in range(first, stage) if types[i].attends]
        whole = [i for i in scoring if types[i].window_field is None]
        if scoring:
            return (whole or scoring)[-1]
    scored = (i for i, one in enumerate(types) if one.attends)
    raise PlanError(
        f"a stage at layer {stage} is to be scored by the attention of a layer before it, but none "
        f"of the layers 0 to {stage - 1} has attention. The first that has is layer "
        f"{next(scored, None)}. Choose layers after it, or a reducer without attention, such as "
        "'divprune'."
    )


# -- before a prompt runs -----------------------------------------------------------------------


def check_turn(call: Call) -> None:
    """Refuse later turns on a cache that another patch compressed, or whose media are cut off."""
    if isinstance(call.first_layer, CompressedLayer):
        call.first_layer.check_patch()
    if call.segments[0].past.rows and call.layer_types.cut_later_turns:
        raise UnsupportedCacheError(
            f"a later turn brings media. {type(call.adapter.decoder).__name__} keeps only a window "
            f"of {call.first_layer.sliding_window} tokens of every turn after the first, so they "
            "would be cut. Give the whole conversation as one prompt, whose tokens are all seen."
        )


def check_length(call: Call) -> None:
    """Refuse prompts so long that layers count columns of the uncompressed prompt, or rows.

    With `positions="compact"`, windows that the body has applied in its masks count columns. These
    masks let tokens of an image attend to each other, so they cannot be rebuilt from padding. For
    layers that scale queries by their row see `Adapter.row_scales`.
    """
    size, length = call.layer_types.smallest, call.length
    if not call.by_column and call.prepared is not None and length > size:
        body = type(call.adapter.body).__name__
        raise OptionError(
            f'positions="compact" does not work here: {body} builds sliding-window masks ({size}) '
            f"from uncompressed positions, of which there are {length}. Use "
            'positions="original" (the default).'
        )
    for name, limit in call.adapter.row_scales.items():
        if limit and length >= limit:
            raise RowIndexedAttentionError(
                f"the prompt has {length} tokens, and layers of "
                f"{type(call.adapter.decoder).__name__} scale queries by the number of their row "
                f"from {limit:g} on ({name}), so that dropping would not equal masking. Give a "
                "shorter prompt, or turn compression off with handle.disabled()."
            )
    if call.by_column:
        check_windows(call)


def check_recomputation(call: Call) -> None:
    """Refuse stages between layers if the backward pass would run them again."""
    recomputed = call.plan.layer_stages and compat.recomputed(call.adapter.layers[0])
    if recomputed and compat.recomputes_hooks():
        raise OptionError(
            "gradient checkpointing with tokens dropped between layers: this transformers release "
            "would drop them again in the backward pass. Use transformers >= 5.23, an entry "
            "reducer, or model.gradient_checkpointing_disable()."
        )


def check_reducers(call: Call) -> None:
    """Refuse prompts that a reducer of the plan cannot read.

    One that needs places in a grid cannot read spans without a known grid. One that compares
    pictures with earlier ones would compare those of different prompts of a row.
    """
    unknown = [span for row in call.spans for span in row if not span.grid_known]
    for span, stage in itertools.product(unknown, call.plan.stages):
        drops = stage.budget is not None or stage.fraction_of(span.modality) < 1
        if drops and stage.reducer.traits.grid != "any":
            raise UnknownGridError(
                f"reducer {stage.reducer.name!r} reads places in the grid of an {span.modality}, "
                f"but the grid of the {span.length} tokens from column {span.start} on is unknown. "
                "Use a reducer that reads features alone, such as 'condiv', 'divprune', "
                "'bipartite' or 'uniform'."
            )
    tower = call.plan.tower
    if tower is not None and SEEN in tower.reducer.needs and call.map.packed:
        raise OptionError(
            f"rows hold several prompts, and {tower.reducer.name!r} drops what earlier "
            "pictures of a row show, which another prompt does not see. Give one prompt per row, "
            "or take a reducer that looks at single pictures, such as 'pixelprune'."
        )


PLAN_CHECKS = (check_modalities, check_entry, check_layer_stages)
PROMPT_CHECKS = (check_turn, check_recomputation, check_reducers, check_length)


def check_plan(plan: Plan, adapter: Adapter) -> None:
    """Refuse a plan that the model cannot follow (`PlanError`), before it is patched."""
    for check in PLAN_CHECKS:
        check(plan, adapter)


def check_cache(cache: Any, between_layers: bool = False) -> None:
    """Refuse caches that cannot hold a compressed prompt.

    `between_layers`: tokens are dropped between layers, so that layers hold different rows.
    """
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise UnsupportedCacheError(
            f"{type(cache).__name__}: continuous batching and legacy caches hold rows that cannot "
            "differ per layer. Use generate() with a DynamicCache (the default)."
        )
    # A cache without layers yet makes them of this class.
    replicate = getattr(cache, "layer_class_to_replicate", None)
    kinds = {getattr(layer, "plain", type(layer)) for layer in layers}
    kinds |= {replicate} if replicate else set()
    quantized = {k for k in kinds if issubclass(k, QUANTIZED)}
    # Layers without rows hold the right state, whichever tokens are dropped.
    kinds -= WITHOUT_ROWS
    special = kinds - DYNAMIC - {StaticLayer} - quantized
    wrong = {kind for kind in special if not is_reference(kind)}
    if wrong:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds {_names(wrong)}; compressed prompts need layers that "
            "keep every row: DynamicLayer, StaticLayer or quantized layers. Drop "
            "cache_implementation=..., or turn compression off with handle.disabled()."
        )
    offloaded = getattr(cache, "offloading", False)
    if between_layers and (offloaded or kinds - DYNAMIC - special):
        raise UnsupportedCacheError(
            f"{type(cache).__name__} holds {'offloaded ' * offloaded}{_names(kinds)}, and this "
            "plan drops tokens between decoder layers, which needs plain DynamicLayer rows on the "
            "device. Use the default cache, or a plan with an entry stage alone (reducers such as "
            "'condiv', 'divprune' or 'bipartite')."
        )


def _names(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


# -- while a prompt runs ------------------------------------------------------------------------


def check_windows(call: Call) -> None:
    """Refuse sequences to which the model would apply a window wrongly after compression.

    With `positions="compact"` windows count the kept rows, which the entry stage must have chosen.
    """
    layer_types, decoder, length = call.layer_types, call.adapter.decoder, call.length_after()
    cut = layer_types.cut
    if cut is not None and length >= cut:
        raise UnsupportedModelError(
            f"the sequence has {length} tokens, and the cache keeps the last {cut} only "
            f"(sliding_window={cut} of the config), although layers attend to all. "
            f"Give fewer than {cut} tokens in all, turn compression off with handle.disabled(), or "
            "set model.config.get_text_config().sliding_window = None and pass no cache."
        )
    if length <= layer_types.smallest:
        return
    backend = compat.attention_implementation(decoder.config)
    if call.by_column and "flash" in backend:
        raise UnsupportedModelError(
            f"the sequence has {length} tokens and {type(decoder).__name__} layers with a window "
            f"of {layer_types.smallest}. The backend {backend} counts the window in rows, "
            'of which there are fewer than positions now. Use attn_implementation="sdpa", or '
            'patch(..., positions="compact").'
        )
    if call.map.packed:
        raise UnsupportedModelError(
            f"rows hold several prompts and {length} tokens, more than the attention window of "
            f"{layer_types.smallest}. Give one prompt per row, or turn compression off "
            "with handle.disabled()."
        )


def check_ragged_turn(call: Call) -> None:
    """Refuse a later turn with padding rows for recurrent layers."""
    if call.segments[0].past.rows and call.layer_types.linear:
        raise UnsupportedCacheError(
            "a later turn brings media, and its samples keep different numbers of tokens. Layers "
            "of linear attention or convolution would take the padding between the turns for "
            "tokens, as they do without compression. Give turns of equal size, one sample at a "
            "time, or the whole conversation as one prompt."
        )


def refuse_recomputation(
    module: nn.Module, lost: str, fix: str = "", certain: bool = False
) -> None:
    """Raise if gradient checkpointing will run this code again, after `lost` is gone.

    `module` is running. A checkpoint around its whole call is no problem, one within it is. The
    stack is inspected, unless it is `certain` that the code will run again.
    """
    if certain or checkpointed_since(module):
        raise OptionError(
            f"activation checkpointing within {type(module).__name__}: the backward pass would "
            f"run a part of it once more without {lost}, and give other gradients. Checkpoint its "
            f"decoder layers with model.gradient_checkpointing_enable(){fix}."
        )


def check_entered(segments: Sequence[Segment], decoder: Any) -> None:
    """Refuse the output of a call if layers have run without the hooks that they need."""
    last = getattr(decoder.config, "num_hidden_layers", len(decoder.layers))
    late = [s.first for s in segments if not s.ready and 0 < s.first < last]
    if late:
        raise UnsupportedModelError(
            f"the layers {late} of {type(decoder).__name__} have run without the hooks that drop "
            "tokens before them. The usual reason is that torch.compile runs what it has compiled "
            "before the hooks were there. Call torch.compiler.reset() and run the prompt again, or "
            "compile the model itself in place of its layers."
        )


def refuse_missing(adapter: Adapter, arguments: Mapping[str, Any], noted: Noted) -> None:
    """Refuse embeddings with tokens dropped in the tower, without a tower stage.

    NaN in features that this call has encoded itself comes from the model.
    """
    x = arguments.get("inputs_embeds")
    encoded = any(adapter.encodes(given or {}) for given in (noted.arguments, noted.inputs))
    if x is not None and not encoded and (missing := int(x.isnan().any(-1).sum())):
        raise SpanError(
            f"{missing} visual tokens were dropped in the vision tower, but this prompt runs "
            "without a tower stage (the handle is disabled or has changed since, or the places of "
            "features are unknown). Encode and read the media under the same setting: pass pixels."
        )


class FeaturelessPrompts:
    """Handles prompts without media: they run uncompressed, or with `strict` are refused."""

    def __init__(self, adapter: Adapter, strict: bool) -> None:
        self.adapter, self.strict = adapter, strict
        self._warned = False

    def meet(self, arguments: Mapping[str, Any]) -> None:
        """Warn, once per patch, if a prompt with placeholders of media runs uncompressed."""
        if self.strict:
            raise NoVisualInputError(
                "strict=True and this prompt brings no image or video, so nothing can be "
                "compressed. Pass pixel_values / pixel_values_videos; with inputs_embeds that "
                "hold features pass mm_token_type_ids (0 text, 1 image, 2 video) too; or use "
                "patch(..., strict=False)."
            )
        if self._warned:
            return
        why = ""
        if self.adapter.hides_features(arguments):
            why = (
                "a prompt came as inputs_embeds without pixels. If it already holds image or "
                "video features, they run uncompressed, because their columns are unknown. "
                "Pass mm_token_type_ids (0 text, 1 image, 2 video) with it."
            )
        elif self.adapter.has_placeholders(arguments):
            why = (
                "a prompt has placeholders of media and no pixels. The model reads them as text, "
                "and nothing is compressed. Pass all that the processor returns: model(**inputs). "
                "An assistant (generate(assistant_model=...)) gets no pixels from transformers; "
                "do not patch it."
            )
        if why:
            self._warned = True
            message = f"{why} This warning appears once per patch."
            warnings.warn(message, UncompressedWarning, stacklevel=2)
