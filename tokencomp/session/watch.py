"""The input of the decoder in one call, before the hooks of a patch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters.base import Adapter, MediaCall
from tokencomp.errors import UnsupportedModelError
from tokencomp.tokens.tokens import VisualSpan


@contextlib.contextmanager
def read_media(
    adapter: Adapter,
    inputs: Mapping[str, Tensor],
    modalities: Tensor,
    positions: Tensor,
    read: Callable[[list[VisualSpan], Tensor], None],
) -> Iterator[None]:
    """In the block, call `read` with spans and embeddings (1, n, d) before the decoder runs.

    `inputs` are those of one part with media, for `modalities` (1, n) see `Adapter.modalities`, and
    `positions` are (3, 1, n) for M-RoPE, else (1, n). `read` may raise.
    """

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        name, embeds = type(adapter.body).__name__, kwargs.get("inputs_embeds")
        if kwargs.get("attention_mask") is not None:  # this call has none
            raise UnsupportedModelError(
                f"{name} makes its masks itself, because the tokens of an image see each other. "
                "transformers does this in the first turn only, so a session would not equal one "
                "prompt. Give the whole conversation as one prompt, or take a causal model such as "
                "Qwen3-VL."
            )
        if embeds is None:
            raise UnsupportedModelError(
                f"the decoder of {name} fills in the media itself, so a session cannot tell what "
                "its rows are. Give the whole conversation as one prompt."
            )
        rows = positions.cpu().numpy() if adapter.mrope else None
        call = MediaCall(modalities.cpu(), embeds, rows, adapter.body, inputs)
        read(adapter.spans(call)[0], embeds)

    adapter.install()
    hook = adapter.decoder.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()
        adapter.uninstall()
