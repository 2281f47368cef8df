"""What tokencomp must know about a model family: names, and how to read its visual spans."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from tokencomp.errors import SpanError, UnsupportedModelError, name_taken
from tokencomp.tokens import Signal, VisualSpan

DATA_PARALLEL = (
    "DataParallel over several devices copies the model to each of them in every call, and a patch "
    "belongs to the original alone. Use DistributedDataParallel (one process per device), or "
    "DataParallel(model, device_ids=[0])."
)
KINDS: dict[int, Literal["image", "video"]] = {1: "image", 2: "video"}
PIXELS = {"pixel_values": 1, "pixel_values_videos": 2}
ENCODED = "mm_encoder_outputs"  # features that `generate` has encoded beforehand, by kind
TYPES = "mm_token_type_ids"  # 0 text, 1 image, 2 video, from the processor


@dataclass
class Call:
    """One forward call that carries visual features, as the adapter sees it.

    Attributes
    ----------
    kinds : Tensor of int8 on the CPU, shape (B, L)
        0 text, 1 image placeholder, 2 video placeholder.
    embeds : Tensor, shape (B, L, d)
        Decoder input, visual features in place.
    positions : Tensor of int64 on the CPU, shape (3, B, L), or None
        M-RoPE positions (t, h, w); None for models with one position per token.
    body : nn.Module
        The module that put the features in place.
    inputs
        Arguments of that module's call by name.
    """

    kinds: Tensor
    embeds: Tensor
    positions: Tensor | None
    body: nn.Module
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def runs(self, row: int) -> list[tuple[int, int, Literal["image", "video"]]]:
        """(start, stop, kind) of every run of equal placeholders in a sample."""
        runs, start = [], 0
        for kind, group in groupby(self.kinds[row].tolist()):
            stop = start + sum(1 for _ in group)
            if kind:
                runs.append((start, stop, KINDS[kind]))
            start = stop
        return runs


@dataclass
class TowerCall:
    """One call of the vision tower: all images, or all videos, of a batch.

    Attributes
    ----------
    values
        By signal, float32, (pictures, rows, d) as the tower holds them; towers that pack patches
        of several pictures make one of all.
    grids : Tensor of int64, shape (media, 3), or None
        (t, h, w) in patches, for towers that take them.
    packing
        Tiles per image, and the other arguments of `Adapter.packer`, if it was called.
    """

    values: dict[Signal, Tensor]
    grids: Any = None
    packing: tuple[list[int], tuple[Any, ...], dict[str, Any]] | None = None


def block_means(x: Tensor, factor: int) -> Tensor:
    """Means over factor × factor blocks of (N, H, W, d); blocks at the edge may be partial."""
    if factor == 1:
        return x
    pooled = nn.functional.avg_pool2d(
        x.movedim(-1, 1), factor, ceil_mode=True, count_include_pad=False
    )
    return pooled.movedim(1, -1)


class Adapter:
    """Base class: one subclass per family, one file per subclass.

    Attributes
    ----------
    family, model_types
        Display name, and the `config.model_type` values it serves.
    mrope
        True if the decoder takes three rows of positions.
    first_layer_stage
        Earliest decoder layer before which tokens may leave (entry, layer 0, is always possible).
    signals
        Sources of the signals that reducers may need (`tokencomp.tokens.Signal`). "attention" is
        recomputed from the queries and keys of the layer before a stage (of layer 0 at entry);
        "tower" is the vision tower's own attention (`tokencomp.engine.tower`).
    packer
        Method of the body that lays out the tiles of images as tokens, where that needs more than
        what the tower returns; None: none.
    """

    family: ClassVar[str] = ""
    model_types: ClassVar[tuple[str, ...]] = ()
    mrope: ClassVar[bool] = False
    first_layer_stage: ClassVar[int] = 1
    signals: ClassVar[tuple[str, ...]] = ("query", "attention")
    packer: ClassVar[str | None] = None

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @classmethod
    def of(cls, model: nn.Module) -> Adapter:
        """The adapter of a model of one of `model_types`.

        Raises
        ------
        UnsupportedModelError
            The installed transformers release computes this family wrongly.
        """
        return cls(model)

    @property
    def top(self) -> Any:
        """The module that generates, and whose forward takes `labels` and `logits_to_keep`."""
        return self.model

    @property
    def body(self) -> Any:
        """The module that assembles embeddings and calls the decoder."""
        return self.model.model

    @property
    def decoder(self) -> Any:
        """The text decoder (no lm_head)."""
        return self.body.language_model

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def text_config(self) -> Any:
        return self.decoder.config

    @property
    def tower(self) -> Any:
        """The vision tower, for families with the signal "tower"."""
        return self.body.vision_tower

    @property
    def class_token(self) -> bool:
        """Whether the first row of every picture in the tower is no patch."""
        return False

    def tower_tokens(self, values: Tensor, kind: str, call: TowerCall) -> Tensor:
        """Values of patches → values of the visual tokens they become, (tokens, d), in order.

        Parameters
        ----------
        values
            As the tower holds them, one row per patch, see `TowerCall.values`.
        kind
            "image" or "video".
        call
            The call that computed them.
        """
        raise SpanError(
            f"{type(self).__name__} must define tower_tokens to offer signals of the tower."
        )

    def placeholder_ids(self) -> dict[int, int]:
        """Token id → kind (1 image, 2 video)."""
        config = self.model.config
        ids = {config.image_token_id: 1}
        video = getattr(config, "video_token_id", None)
        return {**ids, video: 2} if video is not None else ids

    def carries_features(self, inputs: Mapping[str, Any]) -> bool:
        """Whether arguments of `body` or of a prefill hold images or videos."""
        return bool(self.feature_kinds(inputs))

    def feature_kinds(self, inputs: Mapping[str, Any]) -> set[int]:
        """Kinds (1 image, 2 video) of the pixels or encoded features among these arguments."""
        kinds = {kind for name, kind in PIXELS.items() if inputs.get(name) is not None}
        encoded = inputs.get(ENCODED)
        if isinstance(encoded, Mapping):
            kinds |= {kind for kind, name in KINDS.items() if encoded.get(name) is not None}
        elif encoded is not None:
            kinds |= set(KINDS)
        return kinds

    def kinds(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Where the visual features of a call of `body` go.

        A placeholder counts only if the call has features of its kind: the same id in the text of a
        question is text.

        Parameters
        ----------
        inputs
            Arguments of the call by name.

        Returns
        -------
        Tensor of int8, shape (B, L), or None
            0 text, 1 image, 2 video. None if the call carries no visual features.
        """
        features = self.feature_kinds(inputs)
        if not features:
            return self.kinds_in_place(inputs)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        source: Tensor = embeds if ids is None else ids  # type: ignore[assignment]
        kinds = torch.zeros(source.shape[:2], dtype=torch.int8, device=source.device)
        for token, kind in self.placeholder_ids().items():
            if kind not in features:
                continue
            if ids is not None:
                kinds.masked_fill_(ids == token, kind)
            else:
                table = self.model.get_input_embeddings()
                placeholder = table(torch.tensor(token, device=source.device))
                kinds.masked_fill_((source == placeholder).all(-1), kind)
        return kinds

    def kinds_in_place(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Kinds (B, L) of features that already stand in `inputs_embeds`; None if unknown."""
        embeds, types = inputs.get("inputs_embeds"), inputs.get(TYPES)
        if embeds is None or types is None or inputs.get("input_ids") is not None:
            return None
        if types.shape != embeds.shape[:2] or not bool(types.any()):
            return None
        return types.to(torch.int8)

    def hides_features(self, inputs: Mapping[str, Any]) -> bool:
        """Whether `inputs_embeds` may hold features at unknown columns."""
        embeds = inputs.get("inputs_embeds") is not None and inputs.get("input_ids") is None
        return embeds and inputs.get(TYPES) is None and self.kinds_in_place(inputs) is None

    def spans(self, call: Call) -> list[list[VisualSpan]]:
        """Visual spans of every sample, in order.

        Raises
        ------
        SpanError
            A run of visual tokens does not have the shape this family produces.
        """
        return [self.row_spans(call, b) for b in range(call.kinds.shape[0])]

    def row_spans(self, call: Call, row: int) -> list[VisualSpan]:
        """Visual spans of one sample."""
        raise SpanError(
            f"{type(self).__name__} must define spans, or row_spans, which spans calls."
        )

    def gather_extra(
        self, kwargs: MutableMapping[str, Any], index: Tensor, valid: Tensor | None
    ) -> None:
        """Gather further decoder arguments that follow the sequence. Default: none.

        Parameters
        ----------
        index : Tensor of int64, shape (B, n)
            Column of the uncompressed call for every column that is left.
        valid : Tensor of bool, shape (B, n), or None
            False at padding; None if there is none.
        """

    def install(self) -> None:
        """Called when the model is patched. Default: nothing."""

    def uninstall(self) -> None:
        """Undo `install`; safe to call twice."""


PACKAGE = "tokencomp.adapters"
A = TypeVar("A", bound=type[Adapter])
_REGISTRY: dict[str, type[Adapter]] = {}


@overload
def register_adapter(cls: A) -> A: ...


@overload
def register_adapter(*, override: bool) -> Callable[[A], A]: ...


def register_adapter(cls: Any = None, *, override: bool = False) -> Any:
    """Class decorator that makes an adapter available for its model types.

    Use it as `@register_adapter`, or as `@register_adapter(override=True)` to replace the adapter
    that serves one of the model types already.

    Raises
    ------
    NameTakenError
        Another class serves one of the model types, and `override` is False.
    """
    if cls is None:
        return lambda cls: register_adapter(cls, override=override)  # type: ignore[call-overload]
    if not cls.__module__.startswith(f"{PACKAGE}."):
        _load_built_in()  # so that a clash with a built-in adapter shows now, not later
    for model_type in cls.model_types:
        old = _REGISTRY.get(model_type, cls)
        # A reloaded module, or a notebook cell that runs again, defines the same class anew.
        same = (old.__module__, old.__qualname__) == (cls.__module__, cls.__qualname__)
        if not same and not override:
            raise name_taken("model type", model_type, old, cls)
    _REGISTRY.update(dict.fromkeys(cls.model_types, cls))
    return cls


def _load_built_in() -> None:
    package = importlib.import_module(PACKAGE)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{PACKAGE}.{module.name}")


def available_models() -> dict[str, type[Adapter]]:
    """Adapters by `config.model_type`."""
    _load_built_in()
    return dict(sorted(_REGISTRY.items()))


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside the wrappers of PEFT, torch.compile and data parallelism.

    Those of data parallelism (DistributedDataParallel, DataParallel, FullyShardedDataParallel,
    DeepSpeed's engine) keep the model as `module`; `fully_shard` wraps nothing.
    """
    return list(_unwrapped(model))[-1]


def _unwrapped(model: Any) -> Iterator[Any]:
    """`model`, what it wraps, what that wraps, …"""
    while True:
        yield model
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None or inner is model:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or inner is model:
            return
        model = inner


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises
    ------
    UnsupportedModelError
        No adapter serves the model's type, its decoder has layers that are not full attention, or
        the model is copied to several devices in every call (`DataParallel`).
    """
    for wrapper in _unwrapped(model):
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise UnsupportedModelError(DATA_PARALLEL)
    model = unwrap(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = available_models()
    if model_type not in known:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type={model_type!r}) has no adapter. Supported: "
            f"{', '.join(known)}. A new family is one file: see CONTRIBUTING.md."
        )
    try:
        adapter = known[model_type].of(model)
        _ = adapter.body, adapter.decoder, adapter.layers
    except AttributeError as missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {missing}. Pass the ...ForConditionalGeneration model, from "
            "transformers >= 4.57."
        ) from None
    kinds = set(getattr(adapter.text_config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {', '.join(sorted(kinds))} layers; only full attention "
            "can be compressed exactly. Set use_sliding_window=False where the model allows it."
        )
    return adapter
