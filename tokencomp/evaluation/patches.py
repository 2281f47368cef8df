"""Models under a setting: one handle per setting, suspended while other settings answer."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokencomp.evaluation.settings import RANDOM, Setting
from tokencomp.handle import Handle
from tokencomp.patching import apply, unpatched
from tokencomp.reducers.random import Random
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.tokens import Tokens


@dataclass(frozen=True)
class Subsets(Random):
    """`random`, seeded by the seed, the id of the sample, and the index of the span in it.

    The reducer itself gives all spans of a grid the same subset. In an evaluation the luck of that
    draw would affect all questions alike, and not appear in confidence intervals. `names` are the
    ids of the samples of the batch, in order; subsets do not depend on other samples.
    """

    names: tuple[str, ...] = ()

    def reduce(self, tokens: Tokens) -> Kept:
        ((sample, span),) = tokens.places
        seed = zlib.crc32(f"{self.seed}/{self.names[sample]}/{span}".encode())
        return Random(seed).reduce(tokens)


def per_question(setting: Setting, names: Sequence[str]) -> Subsets | None:
    """The reducer that replaces `random` for the questions of a batch; None for other settings."""
    if setting.reducer != RANDOM or not setting.active:
        return None
    return Subsets(setting.options.get("seed", 0), tuple(names))


def patched(model: Any, setting: Setting) -> contextlib.AbstractContextManager[Handle | None]:
    """Patch the model until the end of a block; None for settings that do not patch it."""
    return apply(model, setting) if setting.active else contextlib.nullcontext()


class PatchedModels:
    """Handles of several settings, each created once, with at most one active.

    A context manager: inside it the models (variants of one by name, see `sweep`) have no other
    patch; afterwards their earlier patch is restored.
    """

    def __init__(self, models: dict[str, Any]) -> None:
        self.models = models
        self._handles: dict[Setting, Handle] = {}
        self._outer = contextlib.ExitStack()

    def __enter__(self) -> PatchedModels:
        for model in self.models.values():
            self._outer.enter_context(unpatched(model))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._outer.close()

    @contextlib.contextmanager
    def applied(self, setting: Setting, names: Sequence[str]) -> Iterator[Handle | None]:
        """Patch the model inside the block; yields None if the setting does not patch it.

        `names` are the questions of the batch: `random` draws a subset for each of them.
        """
        if not setting.active:
            yield None
            return
        handle = self._handles.get(setting)
        if handle is None:
            handle = self._handles[setting] = apply(self.models[setting.variant], setting)
        else:
            handle.resume()
        try:
            subsets = per_question(setting, names)
            if subsets is not None:
                handle.set(reducer=subsets)
            yield handle
        finally:
            handle.suspend()
