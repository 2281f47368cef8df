"""Spans and features of a part of a conversation at the input of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters.base import Adapter, MediaCall
from tokencomp.errors import UnsupportedModelError
from tokencomp.tokens.tokens import VisualSpan


class Watch:
    """Reads the input of the decoder in one call: its spans, and features of its patches.

    Runs before the hooks of a patch. For text, where `modalities` is None, it does nothing; for
    `modalities` see `Adapter.modalities`; `positions` are (3, 1, n) for M-RoPE, else (1, n).
    `check` is called with the spans and the number of columns before the decoder runs, and may
    raise. With `appearance`, features (n, d) are stored.
    """

    def __init__(
        self,
        adapter: Adapter,
        inputs: Mapping[str, Tensor],
        modalities: Tensor | None,
        positions: Tensor,
        check: Callable[[Sequence[VisualSpan], int], None],
        appearance: bool,
    ) -> None:
        self._adapter, self._inputs, self._modalities = adapter, inputs, modalities
        self._positions, self._check, self._wanted = positions, check, appearance
        self.spans: list[VisualSpan] | None = None
        self.appearance: Tensor | None = None

    def __enter__(self) -> Watch:
        if self._modalities is not None:
            self._adapter.install()
            self._hook = self._adapter.decoder.register_forward_pre_hook(
                self._look, with_kwargs=True, prepend=True
            )
        return self

    def __exit__(self, *exc: object) -> None:
        if self._modalities is not None:
            self._hook.remove()
            self._adapter.uninstall()

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        name, embeds = type(self._adapter.body).__name__, kwargs.get("inputs_embeds")
        if kwargs.get("attention_mask") is not None:  # this call has none
            raise UnsupportedModelError(
                f"{name} makes its masks itself, because the tokens of an image see each other. "
                "transformers does this in the first turn only, so a session would not equal one "
                "prompt. Give the whole conversation as one prompt, or take a causal model such as "
                "Qwen3-VL."
            )
        if embeds is None or self._modalities is None:
            raise UnsupportedModelError(
                f"the decoder of {name} fills in the media itself, so a session cannot tell what "
                "its rows are. Give the whole conversation as one prompt."
            )
        rows = self._positions.cpu().numpy() if self._adapter.mrope else None
        call = MediaCall(self._modalities.cpu(), embeds, rows, self._adapter.body, self._inputs)
        self.spans = self._adapter.spans(call)[0]
        self._check(self.spans, embeds.shape[1])
        if self._wanted:
            self.appearance = embeds[0].detach()
