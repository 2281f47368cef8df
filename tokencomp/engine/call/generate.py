"""What is known inside of `model.generate` alone; and what `generate_batch` is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tokencomp.adapters.base import TYPES, Adapter
from tokencomp.adapters.structure import parameters_of
from tokencomp.engine.call.gate import CallGate
from tokencomp.engine.call.state import RunningCalls
from tokencomp.errors import NoVisualInputError, OptionError, UnsupportedCacheError
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.replace import MethodReplacement

FIX = "Use model.generate(...), one prompt or a padded batch at a time, or handle.disabled()."


class GenerateCalls(Hooked):
    """Notes what the running `generate` was called with, and looks at requests of `generate_batch`.

    `generate` calls the model with the prompt and whatever it has drafted or generated since; only
    its caller knows where one ends and the other begins. It encodes media before it calls the
    model, so it is counted as one call: features of one setting must not meet the plan of
    another. A patched model therefore carries a `generate` of its own that calls the original.

    Transformers takes token ids alone in continuous batching (`generate_batch`) and runs them in a
    thread of its own, where an error only ends the request. Text runs there as without a patch.
    What cannot be served is refused before the thread starts.

    Parameters
    ----------
    active
        Whether prompts with media are compressed in the calling thread.
    strict
        Whether prompts without media are refused.
    """

    def __init__(
        self,
        adapter: Adapter,
        gate: CallGate,
        calls: RunningCalls,
        active: Callable[[], bool],
        strict: bool,
    ) -> None:
        self.adapter, self.gate, self.calls = adapter, gate, calls
        self.active, self.strict = active, strict

    def install(self) -> None:
        """Replace both methods of the model, where it has them."""
        top = self.adapter.top
        self._handles += [
            MethodReplacement(top, "generate", self._generate),
            MethodReplacement(top, "generate_batch", self._generate_batch),
        ]

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self.calls.state
        earlier = state.columns, state.encodes, state.types
        state.columns, state.encodes = prompt_columns(args, kwargs), self.adapter.encodes(kwargs)
        state.types = None
        if TYPES in kwargs and TYPES not in parameters_of(self.adapter.top):
            state.types = kwargs.pop(TYPES)  # transformers would refuse it
        try:
            if state.types is not None:
                _check_types(state.types, kwargs.get("inputs_embeds"))
            with self.gate.call():
                return original(*args, **kwargs)
        finally:
            state.columns, state.encodes, state.types = earlier

    def _generate_batch(
        self,
        original: Callable[..., Any],
        inputs: Sequence[Sequence[int]],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.active():
            self._check(inputs, kwargs)
        return original(inputs, *args, **kwargs)

    def _check(self, inputs: Sequence[Sequence[int]], kwargs: dict[str, Any]) -> None:
        """Refuse requests that ask for media, which transformers would leave out."""
        if self.adapter.feature_modalities(kwargs):
            raise UnsupportedCacheError(
                "continuous batching takes token ids alone, and this call brings images or videos, "
                f"which the model would never see. {FIX}"
            )
        names = self.adapter.placeholders
        for i, prompt in enumerate(inputs):
            count = sum(token in names for token in prompt)
            if count:
                raise UnsupportedCacheError(
                    f"prompt {i} has {count} placeholders of images or videos, and continuous "
                    f"batching takes token ids alone, so no media would fill them. {FIX}"
                )
        if self.strict:
            raise NoVisualInputError(
                "strict=True, and continuous batching takes token ids alone, so that no prompt "
                "brings an image or video. Use model.generate(...), or patch(..., strict=False)."
            )


def _check_types(types: Tensor, embeds: Tensor | None) -> None:
    """Refuse kinds of features that are not those of `inputs_embeds`, column by column."""
    if embeds is not None and types.shape != embeds.shape[:2]:
        raise OptionError(
            f"{TYPES} of shape {tuple(types.shape)} beside inputs_embeds of shape "
            f"{tuple(embeds.shape)}: expected one number per column, {tuple(embeds.shape[:2])}."
        )


def with_types(arguments: dict[str, Any], types: Tensor) -> dict[str, Any]:
    """Arguments of a call of the body, beside the kinds of features in its `inputs_embeds`.

    `types` (B, L) has the rows of the caller of `generate`, which repeats rows for beams, and all
    columns, of which the body gets those that are not in the cache yet.
    """
    embeds = arguments.get("inputs_embeds")
    if embeds is None or arguments.get("input_ids") is not None:
        return arguments
    rows = types.repeat_interleave(embeds.shape[0] // types.shape[0], 0)
    return {**arguments, TYPES: rows[:, -embeds.shape[1] :]}


def prompt_columns(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Columns of the prompt that `generate` was called with, or None if they do not show it."""
    for name in ("inputs_embeds", "input_ids", "inputs"):
        if isinstance(kwargs.get(name), Tensor):
            return int(kwargs[name].shape[1])
    return int(args[0].shape[1]) if args and isinstance(args[0], Tensor) else None
