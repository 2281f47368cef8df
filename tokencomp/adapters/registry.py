"""Registration and lookup of adapters."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from tokencomp.adapters.base import Adapter
from tokencomp.adapters.structural import StructuralAdapter
from tokencomp.adapters.verified import accepts_unverified, verified_types
from tokencomp.errors import UnsupportedModelError, UnverifiedModelError, check_free

DATA_PARALLEL = (
    "DataParallel over several devices copies the model to each of them in every call, and a patch "
    "belongs to the original alone. Use DistributedDataParallel (one process per device), or "
    "DataParallel(model, device_ids=[0])."
)
PACKAGE = "tokencomp.adapters"
A = TypeVar("A", bound=type[Adapter])
_REGISTRY: dict[str, type[Adapter]] = {}


def register_adapter(cls: A) -> A:
    """Class decorator that registers an adapter for its model types.

    Raises `NameTakenError` if another class is registered for one of them.
    """
    if not cls.__module__.startswith(f"{PACKAGE}."):
        _load_built_in()  # so that a conflict with a built-in adapter is found now
    for model_type in cls.model_types:
        check_free("model type", model_type, _REGISTRY.get(model_type, cls), cls)
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
    """The Hugging Face model inside wrappers of PEFT, torch.compile and data parallelism.

    DistributedDataParallel, DataParallel and DeepSpeed's engine store it as `module`; `fully_shard`
    has no wrapper.
    """
    return list(_unwrapped(model))[-1]


def _unwrapped(model: Any) -> Iterator[Any]:
    """Yield `model`, the model inside it, and so on."""
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
    """The adapter of a model: its family's, or the structural one.

    Raises
    ------
    NoDecoderError, NoPlaceholderError
        The model has no decoder that reads features of media as tokens.
    UnverifiedModelError
        No model of this type was verified.
    UnsupportedModelError
        Not a transformers model, or copied to several devices in every call (`DataParallel`).
    """
    for wrapper in _unwrapped(model):
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise UnsupportedModelError(DATA_PARALLEL)
    inner = getattr(model, "transformers_model", None)  # of an embedder of sentence-transformers
    if inner is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds the model as `.transformers_model`. Patch that: "
            "tokencomp.patch(embedder.transformers_model, ...)."
        )
    model = unwrap(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = available_models()
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no adapter: it has no config with a model_type. Pass a "
            "multimodal model of transformers, e.g. AutoModelForImageTextToText.from_pretrained("
            "...), or `.model` of a pipeline."
        )
    try:
        adapter = known.get(model_type, StructuralAdapter)(model)
    except AttributeError as missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {missing}. Pass the ...ForConditionalGeneration model, from "
            "transformers >= 5.6."
        ) from None
    types = {model_type, getattr(adapter.config, "model_type", model_type)}
    passed = {*known, *verified_types()}
    if not types & passed and not accepts_unverified():
        raise UnverifiedModelError(
            f"{type(model).__name__} (model_type={model_type!r}) has the structure of a model that "
            "can be compressed, but this type has never passed conformance under the installed "
            "transformers release. patch(model, ..., verify=True) checks a tiny copy of it, in "
            f"about a second. Passed: {', '.join(sorted(passed))}."
        )
    return adapter
