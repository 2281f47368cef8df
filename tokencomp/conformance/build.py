"""A tiny random model around a tiny text config; only its text decoder has weights.

The model is created on the meta device, so the default towers cost nothing. Its decoder and output
head are then created on the CPU. The tower never runs: features are inserted where it would return
them, see `tokencomp.conformance.prompts`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokencomp.adapters.structure import find_parts
from tokencomp.conformance.configs import configs_in, move_token_ids, replace_text_config, shallow
from tokencomp.conformance.variants import PLAIN, Variant
from tokencomp.errors import UnsupportedModelError

SMALL, LARGEST = 5_000_000, 50_000_000
"""Parameters of a module outside the decoder that may be created as well, and of a tiny decoder."""


class BuildError(Exception):
    """No tiny model of this type could be built; says nothing about the type itself."""


@dataclass
class TinyModel:
    """A tiny model in evaluation mode, eager attention, float32."""

    model: Any  # the module that generates text: the thinker of an omni model
    whole: Any  # what users call `patch` with: the omni model around it, or `model` itself
    config: Any
    text_config: Any
    decoder: nn.Module
    specials: dict[str, int]  # token ids that the config names, by the name of their field
    variant: Variant = PLAIN  # what was set in addition to the sizes


def tiny_model(model_class: type, config: Any, variant: Variant = PLAIN) -> TinyModel:
    """A tiny model of the class that users call `generate` of, with the mechanisms of a config.

    The config, real or default, is left alone; fields of `variant` get exactly its values. Raises
    `BuildError` if the classes of transformers refuse the small sizes, or need weights outside the
    decoder.
    """
    with quiet():
        return _tiny_model(model_class, copy.deepcopy(config), variant)


def _tiny_model(model_class: type, config: Any, variant: Variant) -> TinyModel:
    try:
        for owner in configs_in(config):
            owner.dtype = torch.float32  # towers and decoders may be created in it
        for path, value in variant.top.items():
            *owners, name = path.split(".")
            setattr(functools.reduce(getattr, owners, config), name, value)
        if variant.text_type:
            config.text_config = CONFIG_MAPPING[variant.text_type]()
        text = replace_text_config(config, _mrope(model_class), variant.text)
        specials = move_token_ids(config, text.vocab_size)
        try:
            model = on_meta(model_class, shallow(config, text), text)
        except Exception:  # the class needs as many layers as its config has
            model = on_meta(model_class, config, text)
        whole, model = model, getattr(model, "thinker", model)
        config = model.config
        model.set_attn_implementation("eager")
        torch.manual_seed(0)
        outer = model.get_decoder()
        count = sum(p.numel() for p in outer.parameters())
        if count > LARGEST:  # it would run too long
            size = f"{count / 1e6:.0f} million parameters in spite of its config"
            raise ValueError(f"{type(outer).__name__} has {size}")
        path = next(name for name, module in model.named_modules() if module is outer)
        if not path:
            raise ValueError(
                f"get_decoder() of {model_class.__name__} returns the whole model. Define it, and "
                "get_image_features"
            )
        decoder: Any = type(outer)(outer.config)
        model.set_submodule(path, decoder)
        _create_small_parts(model)
        _empty_towers(model)
        fill_weights(model)
        with contextlib.suppress(UnsupportedModelError):  # `patch` will say why
            decoder = find_parts(whole).decoder
    except Exception as error:
        raise BuildError(f"{type(error).__name__}: {error}") from error
    for module in decoder.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = "eager"
    return TinyModel(model.eval(), whole.eval(), config, text, decoder, specials, variant)


def on_meta(model_class: type, config: Any, text: Any) -> Any:
    """A model without weights, whose text config is `text`."""
    with torch.device("meta"), _towers_optional(text):
        return model_class(config)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' advice about random weights and odd sizes."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class AbsentTower(nn.Module):
    """Replaces a tower that cannot be created (missing package or invalid default config)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


@contextlib.contextmanager
def _towers_optional(text: Any) -> Iterator[None]:
    """Replace towers whose default config is invalid; they never run."""
    from transformers import AutoModel

    own = AutoModel.__dict__.get("from_config")
    create = AutoModel.from_config

    def from_config(config: Any, **kwargs: Any) -> Any:
        try:
            return create(config, **kwargs)
        except Exception:
            if config is text:
                raise
            return AbsentTower(config)

    AutoModel.from_config = from_config  # type: ignore[method-assign]  # undone below
    try:
        yield
    finally:
        del AutoModel.from_config
        if own is not None:
            AutoModel.from_config = own  # type: ignore[method-assign]  # undone below


def _mrope(model_class: type) -> bool:
    """Whether the code of a model, or of a base, has positions with one row per axis."""
    for cls in model_class.__mro__:
        with contextlib.suppress(OSError, TypeError):  # no source: typed into a notebook
            if "def get_rope_index" in inspect.getsource(sys.modules[cls.__module__]):
                return True
    return False


def _create_small_parts(model: Any) -> None:
    """Allocate the output head, and small modules outside the decoder (projectors, …)."""
    body = getattr(model, "model", None)
    parts = [model.get_output_embeddings(), *model.children()]
    parts += list(body.children()) if isinstance(body, nn.Module) else []
    for owner in (model, *([body] if isinstance(body, nn.Module) else [])):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            new = nn.Parameter(torch.zeros(parameter.shape))  # LLaVA's image_newline
            owner.register_parameter(name, new)
    for part in parts:
        tensors = [] if part is None else [*part.parameters(), *part.buffers()]
        meta = bool(tensors) and all(t.is_meta for t in tensors)
        if meta and sum(t.numel() for t in tensors) < SMALL:
            part.to_empty(device="cpu")
            for tensor in tensors:
                nn.init.zeros_(tensor)


def _empty_towers(model: nn.Module) -> None:
    """Replace tensors on the meta device by empty ones.

    A model reads its device from its first parameter, which may belong to a tower.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                module.register_parameter(name, nn.Parameter(torch.empty(0, dtype=parameter.dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty(0, dtype=buffer.dtype))


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Draw weights such that every layer changes the result, and logits are of order one.

    Matrices are drawn with a spread of 1 / sqrt(inputs): the small spread of initialization makes
    attention almost uniform, and a wrong mask nearly without effect. Vectors (scales of norms,
    decay rates) keep their initialization, unless they are all zero or undefined.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel():
            continue
        if parameter.ndim >= 2:
            inputs = parameter.shape[1:].numel() if "conv" in name else parameter.shape[-1]
            spread = 1.0 if "embed" in name else inputs**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        elif not torch.isfinite(parameter).all() or parameter.abs().max() > 50:
            parameter.fill_(1.0)
        elif not parameter.any() and "norm" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
