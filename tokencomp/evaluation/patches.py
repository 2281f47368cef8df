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
from tokencomp.tokens.tokens import Kept, Tokens


@dataclass(frozen=True)
class Subsets(Random):
    """`random` seeded by its seed, the id of the sample (of `names`), and the index of the span.

    The reducer itself gives all spans of a grid one subset, whose luck would affect all questions
    alike, and not appear in confidence intervals.
    """

    names: tuple[str, ...] = ()

    def reduce(self, tokens: Tokens) -> Kept:
        ((sample, span),) = tokens.span_ids
        seed = zlib.crc32(f"{self.seed}/{self.names[sample]}/{span}".encode())
        return Random(seed).reduce(tokens)


def patched(model: Any, setting: Setting) -> contextlib.AbstractContextManager[Handle | None]:
    """Patch the model until the end of a block; None for settings that do not patch it."""
    return apply(model, setting) if setting.active else contextlib.nullcontext()


class PatchedModels:
    """Handles of several settings, each created once, with at most one active.

    Inside the context the models (by variant, see `sweep`) have no other patch.
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
        """Patch inside the block, if the setting is active; `random` draws a subset per name."""
        if not setting.active:
            yield None
            return
        handle = self._handles.get(setting)
        if handle is None:
            handle = self._handles[setting] = apply(self.models[setting.variant], setting)
        else:
            handle.resume()
        try:
            if setting.reducer == RANDOM:
                handle.set(reducer=Subsets(setting.options.get("seed", 0), tuple(names)))
            yield handle
        finally:
            handle.suspend()
