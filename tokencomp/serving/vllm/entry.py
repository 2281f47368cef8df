"""The classes that vLLM's registry gets: vLLM's own ones, until an option of tokencomp is set.

`Architecture__version` names a class of this module. It is vLLM's class with another constructor
and another choice of processor: without options both build vLLM's objects, so that an installed but
unused plugin changes nothing, and with options they build the compressing ones.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.serving import ENV_OPTIONS, ENV_UNTESTED, KEY
from tokencomp.serving.vllm import MODELS, STOCK, TESTED_VERSIONS
from tokencomp.serving.vllm.contact import check_class


def configured_options(model_config: Any) -> Any:
    """The server's options as written: `--mm-processor-kwargs`, `--hf-overrides`, environment."""
    multimodal = getattr(model_config, "multimodal_config", None)
    options = (getattr(multimodal, "mm_processor_kwargs", None) or {}).get(KEY)
    if options is None:
        options = getattr(model_config.hf_config, KEY, None)
    return options if options is not None else os.environ.get(ENV_OPTIONS) or None


def check_version() -> None:
    """Refuse a vLLM that the compressing classes were not tested with, before they are imported."""
    import vllm

    tested = vllm.__version__.startswith(tuple(f"{version}." for version in TESTED_VERSIONS))
    if not tested and os.environ.get(ENV_UNTESTED) != "1":
        raise UnsupportedModelError(
            f"tokencomp cannot compress in vLLM {vllm.__version__} (tested: "
            f"{', '.join(TESTED_VERSIONS)}; install one of these). Set {ENV_UNTESTED}=1 to try it, "
            "or remove the tokencomp options to serve the model without compression."
        )


@cache
def compressing(architecture: str, kind: str) -> type:
    """Return the compressing subclass of vLLM's class; `kind` is "Model" or "Processor"."""
    check_version()
    mixin = import_module(f"tokencomp.serving.vllm.{MODELS[architecture]}").MIXINS[kind]
    stock = STOCK[architecture].load_model_cls()
    if kind == "Processor":
        stock = stock._processor_factory.processor
    check_class(stock, kind, getattr(mixin, "needs_offsets", False))
    return type(f"Tokencomp{stock.__name__}", (mixin, stock), {"__module__": __name__})


@cache
def refusing(stock: type) -> type:
    """vLLM's processor with a refusal of our options, which vLLM alone would ignore."""

    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            options = getattr(value, "hf_processor_mm_kwargs", value)
            if isinstance(options, Mapping) and KEY in options:
                raise OptionError(
                    "this engine was started without tokencomp options, so it cannot compress. "
                    "Start it with `--hf-overrides '{\"tokencomp\": {}}'` (in Python: "
                    'hf_overrides={"tokencomp": {}}) to allow the options of requests.'
                )
        return stock.apply(self, *args, **kwargs)  # type: ignore[attr-defined]  # of vLLM's class

    return type(stock.__name__, (stock,), {"__module__": stock.__module__, "apply": apply})


def dispatching(architecture: str) -> type:
    """Return a subclass of vLLM's model class that builds what the options need."""
    stock = STOCK[architecture].load_model_cls()

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("vllm_config")
        active = config is not None and configured_options(config.model_config) is not None
        if cls is not result:  # a subclass, such as vLLM's conversion to an embedding model
            if active:
                raise UnsupportedModelError(
                    f"tokencomp cannot compress a {architecture} that vLLM converts "
                    f"({cls.__name__}). Remove the tokencomp options or the conversion."
                )
            return object.__new__(cls)
        return (compressing(architecture, "Model") if active else stock)(*args, **kwargs)

    def processor(info: Any, *args: Any, **kwargs: Any) -> Any:
        if configured_options(info.ctx.model_config) is not None:
            return compressing(architecture, "Processor")(info, *args, **kwargs)
        return refusing(stock._processor_factory.processor)(info, *args, **kwargs)

    members: dict[str, Any] = {"__new__": new, "__module__": stock.__module__}
    # Another version of vLLM may choose processors in another way. Its own choice then stays, and
    # `check_version` refuses options when the model is built.
    with contextlib.suppress(AttributeError, TypeError):
        members["_processor_factory"] = replace(stock._processor_factory, processor=processor)
    result = type(stock.__name__, (stock,), members)
    return result


def __getattr__(name: str) -> type:
    """Return the class `Architecture__version`."""
    architecture = name.partition("__")[0]
    if architecture not in MODELS or architecture not in STOCK:
        raise AttributeError(name)
    result = globals()[name] = dispatching(architecture)
    return result
