"""What the model and its body are called with, noted for the decoder call inside of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call.later import begins_prompt
from tokencomp.engine.call.state import RunningCalls
from tokencomp.errors import NoVisualInputError, UncompressedWarning
from tokencomp.torchlib import compat


class CallNotes:
    """Notes of the running call of every thread.

    The methods change thread-local state, which Dynamo cannot trace: they run between the graphs
    of a compiled model.

    Parameters
    ----------
    calls
        Gets the notes of the model and of its body.
    strict
        Whether prompts without media are refused.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls, strict: bool) -> None:
        self.adapter, self.calls, self.strict = adapter, calls, strict
        self._warned_hidden = False

    @compat.not_compiled
    def note_call(self, arguments: Mapping[str, Any], slices: bool) -> None:
        """Note the labels, and which logits the call must return.

        Parameters
        ----------
        arguments
            Arguments of the model by name.
        slices
            Whether the model applies `logits_to_keep`.
        """
        keep, labels = arguments.get("logits_to_keep", 0), arguments.get("labels")
        if labels is not None or not isinstance(keep, int):
            keep = 0
        state = self.calls.own
        state.labels, state.logits = labels, keep if slices else 0
        state.drafts = max(keep - 1, 0)  # assisted decoding: speculative tokens at the end

    @compat.not_compiled
    def forget_call(self) -> None:
        """Undo `note_call`."""
        state = self.calls.own
        state.labels, state.logits, state.drafts = None, 0, 0

    def note_prompt(self, arguments: dict[str, Any], compresses: bool) -> bool:
        """Note where the visual features of a call go.

        Parameters
        ----------
        arguments
            Arguments of the body by name.
        compresses
            Whether prompts are compressed in this thread; else the arguments alone are noted.

        Returns
        -------
        bool
            Whether the call begins a prompt that brings no features.
        """
        self.forget_prompt()
        state = self.calls.own
        state.body_mask = arguments.get("attention_mask")
        kinds = self.adapter.kinds(arguments) if compresses else None
        if compresses and kinds is None:
            return begins_prompt(arguments)
        state.inputs, state.kinds = arguments, None if kinds is None else kinds.cpu()
        return False

    @compat.not_compiled
    def forget_prompt(self) -> None:
        """Undo `note_prompt`, and forget the forward pass of the decoder."""
        state = self.calls.own
        state.kinds = state.inputs = state.forward = state.body_mask = None

    def called_alone(self, arguments: Mapping[str, Any]) -> None:
        """Treat a decoder that is called on its own like a prompt that brings no features."""
        if begins_prompt(arguments):
            self.without_features(arguments)

    def without_features(self, arguments: Mapping[str, Any]) -> None:
        """Warn, once per patch, that a prompt with features at unknown places runs uncompressed.

        Raises
        ------
        NoVisualInputError
            `strict=True`: a prompt must bring features.
        """
        hidden = self.adapter.hides_features(arguments)
        if self.strict:
            raise NoVisualInputError(
                "strict=True and this prompt brings no image or video, so nothing can be "
                "compressed. Pass pixel_values / pixel_values_videos; beside inputs_embeds with "
                "features in place pass mm_token_type_ids (0 text, 1 image, 2 video) too; or use "
                "patch(..., strict=False)."
            )
        if hidden and not self._warned_hidden:
            self._warned_hidden = True
            warnings.warn(
                "a prompt came as inputs_embeds without pixels. If image or video features already "
                "stand in it, they run uncompressed, because their columns are unknown. "
                "Pass mm_token_type_ids (0 text, 1 image, 2 video) beside it. This warning appears "
                "once per patch.",
                UncompressedWarning,
                stacklevel=2,
            )
