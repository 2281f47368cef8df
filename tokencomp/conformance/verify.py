"""Conformance of one given model: the same checks on a shrunken copy of its config."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tokencomp.adapters.structure import find_parts
from tokencomp.conformance.build import BuildError, tiny_model
from tokencomp.conformance.checks import Compress, Result, check_model
from tokencomp.conformance.variants import PLAIN, WITHOUT_TEXT
from tokencomp.errors import UnsupportedModelError, UnverifiedModelError

Classes = dict[str, tuple[type, ...]]
WEIGHTS = (nn.Linear, nn.Embedding)
"""Quantization and adapters put other classes in their places, which change no position."""
_passed: dict[tuple[Any, ...], Result] = {}


def text_classes(top: nn.Module, decoder: nn.Module) -> Classes:
    """Classes of the decoder's modules and of those around it, by path without layer numbers."""
    inside = next(name for name, module in top.named_modules() if module is decoder)
    found: dict[str, set[type]] = {}
    for name, module in top.named_modules():
        if not name or f"{inside}.".startswith(f"{name}.") or name.startswith(f"{inside}."):
            path, own = re.sub(r"\b\d+\b", "*", name), type(module)
            sharded = own.__mro__[1].__name__ == "FSDPModule"  # `fully_shard` derives a class
            found.setdefault(path, set()).add(own.__mro__[2] if sharded else own)
    return {path: tuple(sorted(classes, key=str)) for path, classes in found.items()}


def _check_classes(model: type, classes: Classes, copied: Classes) -> None:
    """Raise `UnverifiedModelError` for modules that the tiny copy, built from classes, has not.

    The outer class, or the user, has replaced them in the decoder.
    """
    skipped = ""
    for path, own in classes.items():
        there = copied.get(path, ())
        if skipped and path.startswith(skipped):
            continue
        if there and all(issubclass(cls, WEIGHTS) for cls in there):
            skipped = f"{path}."
        elif other := [cls for cls in own if cls not in there]:
            instead = " or ".join(cls.__name__ for cls in there) or "no module"
            raise UnverifiedModelError(
                f"{model.__name__} cannot be checked: {path or 'it'} is a {other[0].__name__}, and "
                f"a tiny model built from the classes of the model and its decoder has {instead} "
                "there. Replace modules in the class of the decoder, or run it without patch()."
            )


def key_of(model: Any) -> tuple[Any, ...]:
    """What the checks of a model depend on: its class, its config, the classes of its modules."""
    parts = find_parts(model)
    classes = text_classes(parts.top, parts.decoder)
    return type(model), str(model.config.to_json_string(use_diff=False)), *classes.items()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run tiny models on the CPU in float32, and leave the settings of torch as they were.

    They run on one thread: with more, an operation of microseconds waits for threads of a busy
    machine, which made a check of two seconds last twenty.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=cards), torch.device("cpu"), torch.inference_mode(False):
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


def verify_model(model: Any, compress: Compress) -> Result:
    """Check that compression is exact on a tiny random model with the config of `model`.

    The tiny model has the layers, positions, masks and caches of the given one; its sizes are small
    and its tower does not run. It takes about a second, and nothing for a config that has passed.
    `compress` must take models of unverified types.

    Raises `UnverifiedModelError` if a check fails, no tiny model can be built, or the model
    generates no text, and `UnsupportedModelError` if its structure is refused.
    """
    own, key = type(model), key_of(model)
    if key in _passed:
        return _passed[key]
    form = WITHOUT_TEXT.get(model.config.model_type, PLAIN)
    with _undisturbed():
        try:
            tiny = tiny_model(own, model.config, form)
        except BuildError as error:
            result = Result("unverified", f"no tiny model of its config can be built: {error}")
        else:
            _check_classes(own, dict(key[2:]), text_classes(tiny.model, tiny.decoder))
            result = check_model(tiny, compress)
    if result.status == "refused":
        raise UnsupportedModelError(result.reason)
    if result.status == "unverified":
        raise UnverifiedModelError(
            f"{own.__name__} was checked on a tiny model with its config, and is not served: "
            f"{result.reason.rstrip('.')}. Run it without patch(). Types that have passed, as "
            "`tokencomp list models` says, need no verify=True."
        )
    _passed[key] = result
    return result
