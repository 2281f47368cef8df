"""Finds the parts of a multimodal model by structure, not by family name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokencomp.errors import NoDecoderError, NoPlaceholderError
from tokencomp.tokens.tokens import CODES, Modality

# Names of placeholder ids in configs, by modality; the first that exists is used.
IDS: dict[Modality, tuple[str, ...]] = {
    "image": (
        "image_token_id",
        "image_token_index",
        "image_patch_id",
        "img_context_token_id",
        "image_placeholder_token_id",
    ),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
# Arguments of decoders that read features by cross-attention: the features are no tokens of the
# prompt, so none can be dropped.
BESIDE = (
    *("cross_attention_states", "encoder_hidden_states", "image_hidden_states"),
    *("image_encoder_embeddings", "perceiver_embeddings"),
)
# Argument of models (Kosmos) with a mask of placeholders, instead of a token id.
PLACES = "image_embeds_position_mask"


@dataclass(frozen=True)
class Parts:
    """The modules of a multimodal model that compression uses.

    `top` generates: its forward takes `labels` and `logits_to_keep`; it is the body if no module
    generates (`AutoModel`, embedding models). `body` inserts features into the embeddings and calls
    the `decoder`, the text decoder without the output head, which has `layers`.
    """

    top: Any
    body: Any
    decoder: Any


def find_parts(model: Any) -> Parts:
    """The parts of a model.

    Raises `NoDecoderError` without a causal text decoder with layers that reads the features as
    tokens, and `NoPlaceholderError` if no token id marks the features.
    """
    thinker = getattr(model, "thinker", None)  # the part of omni models that reads the prompt
    top = thinker if isinstance(thinker, nn.Module) else model
    _refuse_other_decoders(model, top)
    decoder = _decoder(top)
    beside = [name for name in BESIDE if name in parameters_of(decoder)]
    if beside:
        raise NoDecoderError(
            f"the decoder of {type(model).__name__} takes {', '.join(beside)}: it reads features "
            "of media by cross-attention, so no token of its sequence can be dropped."
        )
    body = _body(top, decoder)
    if hasattr(top, "generate"):
        return Parts(top, body, decoder)
    takes_media = any(feature_modality(name) for name in parameters_of(body))
    if not takes_media or type(body.config) is not type(top.config):  # more than a body
        raise NoDecoderError(
            f"{type(model).__name__} does not generate text. Pass the whole model, such as its "
            "...ForConditionalGeneration class, or its body, as AutoModel loads it."
        )
    return Parts(body, body, decoder)


def _refuse_other_decoders(model: Any, top: Any) -> None:
    """Refuse models that do not continue a prompt which contains the features as tokens."""
    name = type(model).__name__
    if PLACES in parameters_of(top):
        count = getattr(top.config, "latent_query_num", "some")
        raise NoPlaceholderError(
            f"{name} reads an image as {count} learned queries, whose places {PLACES} gives "
            "instead of a placeholder id, so nothing tells which tokens of a prompt are features. "
            "Run it without patch()."
        )
    if getattr(top.config, "is_encoder_decoder", False):
        raise NoDecoderError(
            f"{name} is an encoder-decoder: its decoder reads features of media by "
            "cross-attention, so no token of its sequence can be dropped."
        )
    if any(isinstance(getattr(m, "query_tokens", None), nn.Parameter) for m in top.modules()):
        raise NoDecoderError(
            f"{name} reads an image as {top.config.num_query_tokens} learned queries of a "
            "Q-Former, and its generate() puts them into the prompt itself, out of reach of "
            "patch(). Run it without patch()."
        )
    if "decoder_input_ids" in parameters_of(top):
        raise NoDecoderError(
            f"{name} writes text in a separate sequence (decoder_input_ids), which reads the "
            "prompt by cross-attention, so it is no causal decoder. Run it without patch()."
        )


def _decoder(top: Any) -> Any:
    """The text decoder of a model, without wrappers with an output head."""
    get = getattr(top, "get_decoder", None)
    decoder = get() if get is not None else None
    while decoder is not None and not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        inner = getattr(decoder, "model", None)
        decoder = inner if isinstance(inner, nn.Module) and inner is not decoder else None
    if decoder is None:
        decoder = next(_owners_of_embeddings(top), None)
    if decoder is None:
        raise NoDecoderError(
            f"{type(top).__name__} has no text decoder with a list of layers, as get_decoder() of "
            "transformers' generating models returns it. Pass the model that generates."
        )
    return decoder


def _owners_of_embeddings(top: Any) -> Iterator[Any]:
    """Modules with layers and a table of input embeddings (remote code)."""
    if not hasattr(top, "get_input_embeddings"):
        return
    try:
        table = top.get_input_embeddings()
    except NotImplementedError:  # a tower, or a pair of towers
        return
    for module in top.modules():
        owns = any(child is table for child in module.children())
        if owns and isinstance(getattr(module, "layers", None), nn.ModuleList):
            yield module


def _body(top: Any, decoder: Any) -> Any:
    """The innermost module around the decoder whose forward takes features of media."""
    path = next(name for name, module in top.named_modules() if module is decoder)
    names = path.split(".")[:-1]
    for depth in range(len(names), 0, -1):
        module = top.get_submodule(".".join(names[:depth]))
        if any(feature_modality(name) for name in parameters_of(module)):
            return module
    return top


def parameters_of(module: Any) -> Mapping[str, inspect.Parameter]:
    """Parameters of a module's forward by name, as its class defines it.

    The instance may have a wrapped forward, as with accelerate.
    """
    return inspect.signature(type(module).forward).parameters


@functools.cache
def feature_modality(name: str) -> Modality | None:
    """The modality that an argument of the body or a prefill contains, by its name; None: none."""
    if "pixel_values" in name or name == "image_patches":
        return "video" if "video" in name else "image"
    if name in ("input_features", "input_values", "audio_values", "audio_input_ids"):
        return "audio"
    return None


def find_placeholders(parts: Parts) -> dict[int, int]:
    """Token id → modality (1 image, 2 video, 3 audio) of the placeholders that features replace.

    Videos whose frames use placeholders of images have no id. Raises `NoPlaceholderError` if the
    config names no placeholder.
    """
    ids: dict[int, int] = {}
    for modality, names in IDS.items():
        sources = ((source, name) for name in names for source in (parts.top.config, parts.body))
        values = (getattr(source, name, None) for source, name in sources)
        token = next((value for value in values if isinstance(value, int)), None)
        if token is not None:
            ids.setdefault(token, CODES[modality])
    if not ids:
        _refuse_own_placeholders(parts)
        raise NoPlaceholderError(
            f"the config of {type(parts.top).__name__} names no placeholder of images, videos or "
            f"audio ({', '.join(name for names in IDS.values() for name in names)}), so nothing "
            "tells which tokens of a prompt are features."
        )
    return ids


def _refuse_own_placeholders(parts: Parts) -> None:
    """Refuse decoders that insert features themselves (Phi-4-multimodal)."""
    config, name = parts.top.config, type(parts.top).__name__
    inner = [getattr(config, f"{modality}_config", None) for modality in ("vision", "audio")]
    named = any(hasattr(own, field) for own in inner for names in IDS.values() for field in names)
    if named and any(feature_modality(argument) for argument in parameters_of(parts.decoder)):
        raise NoPlaceholderError(
            f"the decoder of {name} takes pixels, and puts features into its embeddings itself, at "
            "placeholders that only its towers' configs name: out of reach of patch(). Run it "
            "without patch()."
        )


def mrope_rows(parts: Parts) -> int:
    """Number of rows of positions in the rotary embedding; 0: one position per token.

    Three (time, height, width), or the number of sections of the rotary embedding.
    """
    tables = (
        getattr(parts.decoder.config, name, None) for name in ("rope_parameters", "rope_scaling")
    )
    sections = [getattr(getattr(parts.decoder, "rotary_emb", None), "mrope_section", None)]
    sections += [
        t["mrope_section"] for t in tables if isinstance(t, Mapping) and "mrope_section" in t
    ]
    known = next((s for s in sections if s), None)
    if known is None and not hasattr(parts.body, "get_rope_index"):
        return 0
    return max(3, len(known or ()))


def row_scales(decoder: Any) -> dict[str, float | None]:
    """Fields of the config by which layers scale queries by their row, which dropping rows changes.

    Field → first scaled row, None if the config does not name it. Decoders that scale by position
    are no such decoders.
    """
    config, names = decoder.config, parameters_of(decoder.layers[0])
    found: dict[str, float | None] = {}
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4
        found["floor_scale"] = getattr(config, "floor_scale", None)
    floor = getattr(config, "log_scaling_n_floor", None)
    if floor and "relative_distance" not in names:  # Inkling; Inkling 2 scales by position
        found["log_scaling_n_floor"] = floor
    return found


def scales_queries(config: Any) -> bool:
    """Whether attention scales queries by their position (Ministral 3, Mistral 4)."""
    tables = (getattr(config, name, None) for name in ("rope_parameters", "rope_scaling"))
    return any(isinstance(t, Mapping) and "llama_4_scaling_beta" in t for t in tables)


def deepstack_layers(config: Any) -> int:
    """To how many of the first decoder layers features of the vision tower are added."""
    # Granite 4 Vision lists pairs of tower and decoder layers; others add to the first layers.
    pairs = getattr(config, "deepstack_layer_map", None) or ()
    vision = getattr(config, "vision_config", None)
    indexes = getattr(vision, "deepstack_visual_indexes", None) or ()
    return max(len(indexes), *(int(layer) + 1 for _, layer in pairs), 0)


def square_side(value: Any) -> int | None:
    """A size in a config that is a number, or two equal numbers; None for anything else."""
    if isinstance(value, int):
        return value
    if isinstance(value, list | tuple) and len(set(value)) == 1 and isinstance(value[0], int):
        return value[0]
    if isinstance(value, Mapping):
        return square_side(tuple(value.values()))
    return None
