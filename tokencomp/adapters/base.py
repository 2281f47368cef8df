"""What compression needs to know about a model, calls of its body, and what these encode."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tokencomp.adapters.items import ItemEnds
from tokencomp.adapters.structure import (
    Parts,
    deepstack_layers,
    feature_modality,
    find_parts,
    find_placeholders,
    mrope_rows,
    parameters_of,
    row_scales,
)
from tokencomp.adapters.towers.base import Tower, TowerCall, unknown_cells
from tokencomp.tokens.tokens import CODES, MODALITIES, Modality, VisualSpan
from tokencomp.torchlib import compat
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.replace import MethodReplacement

INTEGERS = (torch.int32, torch.int64)
Size = tuple[int, int, int]
Run = tuple[int, int, Modality]  # start, stop, modality of equal placeholders
ENCODED = "mm_encoder_outputs"  # features that `generate` has encoded, by modality
TYPES = "mm_token_type_ids"  # 0 text, 1 image, 2 video, 3 audio, from the processor

FINAL_NORMS = ("norm", "final_layernorm", "final_norm", "norm_f", "ln_f", "embedding_norm")
"""Names of the norm after the last decoder layer; the last is LFM2's."""


@dataclass
class MediaCall:
    """One forward call with features of media.

    `modalities`, int8 (B, L) on the CPU: 0 text, 1 image, 2 video, 3 audio; `embeds` (B, L, d):
    input of the decoder, with features; `positions`, int64 (3, B, L): M-RoPE positions (t, h, w),
    None for models with one position per token; `body`: the module that inserted the features;
    `inputs`: arguments of its call by name.
    """

    modalities: Tensor
    embeds: Tensor
    positions: np.ndarray[Any, Any] | None
    body: nn.Module
    inputs: Mapping[str, Any] = field(default_factory=dict)


# -- media that the body has encoded ---------------------------------------------------------------


@dataclass
class Encoding:
    """Media of one modality that a body has encoded in one call, in the order of the batch.

    `lengths`: tokens of each medium, or of each tile if the body encodes tiles; `tables`: arguments
    of the call that may contain sizes; `map`: height and width of the tower's feature map, if any.
    """

    lengths: list[int] = field(default_factory=list)
    tables: list[Any] = field(default_factory=list)
    map: tuple[int, int] | None = None

    @functools.cached_property
    def sizes(self) -> list[Size]:
        """(t, h, w) of each medium in the unit of the call, patches or pixels; empty if unknown.

        Computed on demand: it reads a table from the device, and positions often give the grid.
        """
        tables = (per_medium(sizes_in(table), self.lengths) for table in self.tables)
        return next(filter(None, tables), [])

    def size(self, counts: list[int], number: int) -> Size | None:
        """Size of medium `number` of a batch with `counts` media per sample; None if unknown.

        Beam search repeats the samples of a batch after encoding, copies of a sample being
        adjacent.
        """
        known, order, cursor = self.sizes, list[Size](), 0
        copies, rest = divmod(sum(counts), len(known) or 1)
        if not known or rest or len(counts) % copies:
            return None
        for count in counts[::copies]:
            order += known[cursor : cursor + count] * copies
            cursor += count
        return order[number] if len(order) == sum(counts) else None


class EncodedMedia(threading.local):
    """Calls of the methods of a body that encode media: the running one, and the last ones.

    `generate` of transformers >= 5.18 encodes media before it calls the model, and drops arguments
    that only the encoder reads, which give the shape of images. `latest` has the results of the
    last call in this thread, by modality.
    """

    def __init__(self) -> None:
        self.latest: dict[Modality, Encoding] = {}
        self._running: tuple[Modality, Callable[..., Any], Any, dict[str, Any]] | None = None

    def watch(self, body: Any, methods: Mapping[str, Modality]) -> list[MethodReplacement]:
        """Wrap the encoding `methods` of `body` (name → modality) to note their calls."""
        return [
            MethodReplacement(body, name, functools.partial(self._call, modality))
            for name, modality in methods.items()
        ]

    @property
    def running(self) -> tuple[Modality, dict[str, Any]]:
        """Modality and arguments, by name, of the running call of this thread.

        An image without arguments, if the tower was called directly.
        """
        if self._running is None:
            return "image", {}
        modality, method, args, kwargs = self._running
        bound = inspect.signature(method).bind_partial(*args, **kwargs).arguments
        return modality, {**bound, **bound.get("kwargs", {})}

    def _call(
        self, modality: Modality, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self._running:  # the method for videos calls that for images (Qwen3.5)
            return original(*args, **kwargs)
        self._running = modality, original, args, kwargs
        try:
            out = original(*args, **kwargs)
        finally:
            self._running = None
        self._note(modality, [*args, *kwargs.values()], out)
        return out

    @compat.not_compiled
    def _note(self, modality: Modality, arguments: list[Any], out: Any) -> None:
        last = getattr(out, "last_hidden_state", None)
        # Not pixels, which would be kept in memory.
        tables = [a for a in arguments if not isinstance(a, Tensor) or a.dtype in INTEGERS]
        encoding = Encoding(token_counts(out), tables)
        if isinstance(last, Tensor) and last.ndim == 4:
            encoding.map = last.shape[-2], last.shape[-1]
        self.latest[modality] = encoding


def token_counts(out: Any) -> list[int]:
    """Tokens of every medium or tile that an encoding method returns.

    Its features are (tiles, n, d), or a list of (…, n, d). Empty for concatenated features (n, d),
    whose ends are unknown, and for features of single patches, (n, 1, d) (Inkling).
    """
    fields = (getattr(out, name, None) for name in ("pooler_output", "last_hidden_state"))
    # Remote code returns only the features.
    features = next((value for value in fields if value is not None), out)
    if isinstance(features, list | tuple):
        tensors = [item for item in features if isinstance(item, Tensor) and item.ndim >= 2]
    else:
        tensors = [features] if isinstance(features, Tensor) and features.ndim >= 3 else []
    counts = [n for item in tensors for n in [item.shape[-2]] * item.shape[:-2].numel()]
    return counts if max(counts, default=0) > 1 else []


def sizes_in(argument: Any) -> list[tuple[int, int, int]]:
    """Sizes (t, h, w) in an argument of an encoder; empty if it contains something else.

    An integer table with two or three columns contains sizes. With a further axis it contains patch
    coordinates, padded with -1, whose maximum gives the size.
    """
    if isinstance(argument, list | tuple):
        try:
            argument = torch.tensor(argument)
        except (TypeError, ValueError, RuntimeError):  # pictures, strings, rows of several lengths
            return []
    if not isinstance(argument, Tensor) or argument.dtype not in INTEGERS:
        return []
    if argument.ndim == 3 and argument.shape[-1] == 2:
        argument = (argument.amax(1) + 1).flip(-1)  # coordinates are (x, y)
    if argument.ndim != 2 or argument.shape[1] not in (2, 3):
        return []
    rows = argument.tolist()
    return [(row[0] if len(row) == 3 else 1, row[-2], row[-1]) for row in rows]


def per_medium(sizes: list[tuple[int, int, int]], lengths: list[int]) -> list[tuple[int, int, int]]:
    """One size for each medium of `lengths` tokens, or none.

    A size per frame can stand for the video of these frames (Gemma 4).
    """
    if len(sizes) == len(lengths) or not sizes or not lengths:
        return sizes if len(sizes) == len(lengths) else []
    tokens, rest = divmod(sum(lengths), len(sizes))
    _, height, width = sizes[0]
    if rest or not tokens or any(size != (1, height, width) for size in sizes):
        return []
    if any(n % tokens for n in lengths):
        return []
    return [(n // tokens, height, width) for n in lengths]


# -- what a family adds ----------------------------------------------------------------------------


class Adapter(Hooked):
    """What compression needs to know about one model. Subclasses add what its structure does not
    show.

    Attributes
    ----------
    family, model_types
        Display name, and `config.model_type` values of a subclass.
    signals
        Sources of signals for reducers (`tokencomp.tokens.signals.Signal`). "attention" is
        recomputed from queries and keys of the layer before a stage (layer 0 at entry); "tower" is
        attention of the vision tower (`tokencomp.engine.tower.signals`).
    packer
        Method of the body that arranges image tiles as tokens, if this needs more than the output
        of the tower; else None.
    layer_stages
        Whether tokens can be dropped between decoder layers.
    mrope, mrope_rows
        Whether the decoder takes several rows of positions, and how many (usually three).
    layers, text_config
        The layers of the decoder, and its config.
    row_scales
        Field of the config → first row whose queries are scaled by their row number.
    placeholders
        Token id → modality (1 image, 2 video, 3 audio).
    encoders
        Methods of the body that encode media, and the modality of each.
    encoded
        Their calls, while the model is patched.
    item_ends
        Which spans are parts of one item.
    layers_read_positions
        Whether layers may read `position_ids` other than for the rotary embedding.
    """

    family: ClassVar[str] = ""
    model_types: ClassVar[tuple[str, ...]] = ()
    signals: ClassVar[tuple[str, ...]] = ("query", "attention", "frames")
    packer: ClassVar[str | None] = None
    encoders: ClassVar[dict[str, Modality]] = {f"get_{name}_features": name for name in CODES}
    layer_stages: ClassVar[bool] = True
    mrope: bool = False
    layers_read_positions: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        parts = self.find_parts(model)
        self.top, self.body, self.decoder = parts.top, parts.body, parts.decoder
        self.layers: nn.ModuleList = self.decoder.layers
        self.text_config: Any = self.decoder.config
        self.row_scales = row_scales(self.decoder)
        self.mrope_rows = mrope_rows(parts) or 3 * self.mrope
        self.mrope = self.mrope_rows > 0
        self.placeholders = find_placeholders(parts)  # raises if there are none
        self.encoded = EncodedMedia()
        self.item_ends = ItemEnds(model)

    def find_parts(self, model: nn.Module) -> Parts:
        return find_parts(model)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last decoder layer; None if it has no usual name."""
        found = (getattr(self.decoder, name, None) for name in FINAL_NORMS)
        return next((norm for norm in found if isinstance(norm, nn.Module)), None)

    @property
    def config(self) -> Any:
        return self.top.config

    @property
    def rotary(self) -> Any:
        """The module that computes the rotary tables of the decoder, or None."""
        return getattr(self.decoder, "rotary_emb", None)

    def rotary_tables(self, x: Tensor, positions: Tensor, layer: int) -> Any:
        """`position_embeddings` of a decoder layer for x (B, n, d); None if it takes none.

        `positions` are int64, (3, B, n) for M-RoPE, else (B, n).
        """
        if self.rotary is None:
            return None
        if "layer_type" not in parameters_of(self.rotary):  # all types share them
            return self.rotary(x, positions)
        return self.rotary(x, positions, layer_type=self.text_config.layer_types[layer])

    @property
    def first_layer_stage(self) -> int:
        """First decoder layer, after layer 0, before which tokens can be dropped.

        That is after the last layer to which features of the vision tower are added (deepstack).
        """
        return max(1, deepstack_layers(self.config))

    @property
    def tower(self) -> Any:
        """The vision tower, for families with the signal "tower"."""
        return self.body.vision_tower

    @property
    def feature_layer(self) -> int | list[int]:
        """Which hidden state (or states) of the vision tower the model uses.

        Counted as in transformers: 0 is the input of the first block, -1 the output of the last.
        """
        return -1

    def used_blocks(self, blocks: int) -> int:
        """Number of the `blocks` of the vision tower that the model uses, from the first on."""
        layers = self.feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        return max(layer + blocks + 1 if layer < 0 else layer for layer in layers)

    @property
    def class_token(self) -> bool:
        """Whether the first row of every picture in the tower is a class token."""
        return False

    def tower_tokens(self, values: Tensor, modality: str, call: TowerCall) -> Tensor:
        """Map values of patches to values of visual tokens, (tokens, d), in order.

        `values` has one row per row of the tower, see `TowerCall.values` of the `call`. For
        families with the signal "tower".
        """
        raise NotImplementedError

    def tower_layout(self) -> Tower:
        """Which patches every visual token reads; raises `UnsupportedModelError` if unknown."""
        raise unknown_cells(self.family)

    @property
    def media(self) -> set[str]:
        """Modalities that the model takes: those with placeholders or arguments."""
        arguments = (*parameters_of(self.top), *parameters_of(self.body))
        modalities = set(filter(None, map(feature_modality, arguments)))
        return {MODALITIES[code] for code in self.placeholders.values()} | modalities

    def feature_modalities(self, inputs: Mapping[str, Any]) -> set[int]:
        """Modalities (1, 2, 3) of features or pixels among arguments of the body or a prefill."""
        names = {feature_modality(name) for name, value in inputs.items() if value is not None}
        encoded = inputs.get(ENCODED)
        if isinstance(encoded, Mapping):
            names |= {name for name in CODES if encoded.get(name) is not None}
        elif encoded is not None:
            names |= set(CODES)
        return {CODES[modality] for modality in names if modality is not None}

    def encodes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments encodes media itself."""
        return inputs.get(ENCODED) is None and bool(self.feature_modalities(inputs))

    def modalities(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The modality of the feature in every column of a call of the body.

        Placeholders count only if the call has features of their modality: the same id in a
        question is text. Videos without placeholders of their modality use those of images, as in
        GLM-4.1V. Returns int8 (B, L): 0 text, 1 image, 2 video, 3 audio; None without features.
        """
        features = self.feature_modalities(inputs)
        if not features:
            embeds = inputs.get("inputs_embeds")
            return None if embeds is None else self.modalities_in_place(inputs)
        ids: Tensor | None = inputs.get("input_ids")
        source: Tensor = inputs["inputs_embeds"] if ids is None else ids
        modalities = torch.zeros(source.shape[:2], dtype=torch.int8, device=source.device)
        columns = {}
        for token, modality in self.placeholders.items():
            if ids is not None:
                columns[modality] = ids == token
            else:
                table = self.model.get_input_embeddings()
                placeholder = table(torch.tensor(token, device=source.device))
                columns[modality] = (source == placeholder).all(-1)
        if 2 in features and not (2 in columns and bool(columns[2].any())):
            columns[2] = columns.get(1, torch.zeros_like(modalities, dtype=torch.bool))
        for modality in features & set(columns):
            modalities.masked_fill_(columns[modality], modality)
        return modalities

    def modalities_in_place(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Modalities (B, L) of features that `inputs_embeds` already contains; None if unknown."""
        embeds, types = inputs.get("inputs_embeds"), inputs.get(TYPES)
        if embeds is None or types is None or inputs.get("input_ids") is not None:
            return None
        if types.shape != embeds.shape[:2] or not bool(types.any()):
            return None
        modalities: Tensor = types.to(torch.int8)
        return modalities

    def hides_features(self, inputs: Mapping[str, Any]) -> bool:
        """Whether `inputs_embeds` may contain features in unknown columns."""
        embeds = inputs.get("inputs_embeds") is not None and inputs.get("input_ids") is None
        return embeds and inputs.get(TYPES) is None and self.modalities_in_place(inputs) is None

    def has_placeholders(self, inputs: Mapping[str, Any]) -> bool:
        ids: Tensor | None = inputs.get("input_ids")
        tokens = list(self.placeholders)
        return ids is not None and bool(torch.isin(ids, ids.new_tensor(tokens)).any())

    def spans(self, call: MediaCall) -> list[list[VisualSpan]]:
        """Visual spans of every sample, in order; raises `SpanError` for unknown shapes of runs."""
        rows = enumerate(runs_of(call.modalities))
        return [self.row_spans(call, row, runs) for row, runs in rows]

    def row_spans(self, call: MediaCall, row: int, runs: list[Run]) -> list[VisualSpan]:
        """Visual spans of one sample from its runs, for adapters that do not override `spans`."""
        raise NotImplementedError

    def install(self) -> None:
        """Note calls of the methods that encode media, while the model is patched."""
        self.uninstall()
        self._handles.extend(self.encoded.watch(self.body, self.encoders))

    def uninstall(self) -> None:
        """Undo `install`; safe to call twice."""
        self.remove()
        self.encoded.latest = {}


def runs_of(modalities: Tensor) -> list[list[Run]]:
    """(start, stop, modality) of every run of equal codes in modalities (B, L), per sample."""
    rows = []
    for codes in modalities.tolist():
        runs, start = [], 0
        for code, group in groupby(codes):
            stop = start + sum(1 for _ in group)
            if code:
                runs.append((start, stop, MODALITIES[code]))
            start = stop
        rows.append(runs)
    return rows


def block_means(x: Tensor, factor: int) -> Tensor:
    """Means over factor × factor blocks of (N, H, W, d); blocks at the edge may be partial."""
    if factor == 1:
        return x
    pooled = nn.functional.avg_pool2d(
        x.movedim(-1, 1), factor, ceil_mode=True, count_include_pad=False
    )
    return pooled.movedim(1, -1)
