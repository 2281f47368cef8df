"""Models under a setting: one handle per setting, suspended while other settings answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.subsets import per_question
from tokencomp.handle import Handle
from tokencomp.patching import apply, unpatched


@contextlib.contextmanager
def patched(model: Any, setting: Setting) -> Iterator[Handle | None]:
    """Patch the model inside the block; None for settings that leave the model alone."""
    if not setting.active:
        yield None
        return
    with apply(model, setting) as handle:
        yield handle


class PatchedModels:
    """Handles of several settings, each built once, with at most one of them in force.

    Use as a context manager: inside it the models have no other patch, and on leaving it they get
    back the patch that they had.

    Parameters
    ----------
    models
        Variants of one model by name, see `sweep`.
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
        """Patch the model inside the block; yields None where the setting does not patch it.

        Parameters
        ----------
        names
            Ids of the questions of the batch: `random` gives each of them a subset of its own.
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
