"""Chunked prefill (`prefill_chunk_size`) of prompts with media: the decoder runs in chunks.

Transformers would cut the prompt before the model, so that a chunk boundary could cut a span, and
a reducer would not see the question. Here the vision tower and the entry stage see the whole prompt
once, and the decoder then takes what is left of it in chunks: what grows with the square of the
prompt, or with the width of the MLP, is bounded by the chunk.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.engine.call.state import RunningCalls
from tokencomp.engine.rows.arguments import gather_arguments
from tokencomp.engine.stage.forward import ForwardPass
from tokencomp.errors import PrefillWarning
from tokencomp.torchlib import compat
from tokencomp.torchlib.hooks import Hooked
from tokencomp.torchlib.replace import MethodReplacement

PREFILL = "_prefill"  # the method of transformers' generation that runs it


class ChunkedPrefill(Hooked):
    """Takes `prefill_chunk_size` from `generate` and applies it behind the entry stage.

    Text-only prompts, and every prompt while nothing is compressed, are chunked by transformers.
    Releases without the method that is replaced do not chunk prompts with media.

    Parameters
    ----------
    calls
        Gets `chunk` while `generate` runs a prefill.
    active
        Whether prompts with media are compressed in the calling thread.
    """

    def __init__(self, adapter: Adapter, calls: RunningCalls, active: Callable[[], bool]) -> None:
        self.adapter, self.calls, self.active = adapter, calls, active

    def install(self) -> None:
        """Replace `model._prefill`, where the release has it."""
        self._handles.append(MethodReplacement(self.adapter.top, PREFILL, self._prefill))

    def _prefill(
        self,
        original: Callable[..., Any],
        input_ids: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        size = getattr(generation_config, "prefill_chunk_size", None)
        original = functools.partial(original, input_ids)
        media = size is not None and self.adapter.feature_modalities(model_kwargs)
        # transformers refuses to chunk without a cache
        if not (media and self.active()) or compat.get_cache(model_kwargs) is None:
            return original(generation_config, model_kwargs, *args, **kwargs)
        whole = copy.copy(generation_config)
        whole.prefill_chunk_size = None
        state = self.calls.state
        state.chunk = size
        for option in ("output_hidden_states", "output_attentions"):
            if getattr(generation_config, option, False):
                _one_pass(size, f"{option}=True needs every column of one pass")
                state.chunk = None
        try:
            return original(whole, model_kwargs, *args, **kwargs)
        finally:
            state.chunk = None

    def advance(
        self, decoder: nn.Module, kwargs: dict[str, Any], forward: ForwardPass, logits: int
    ) -> dict[str, Any]:
        """Run all chunks of a compressed prefill but the last; the caller's call is the last.

        Parameters
        ----------
        kwargs
            Arguments of the decoder for the whole compressed prompt.
        forward
            Gets `chunk`, and `earlier`: hidden states of the chunks that have run, where the call
            must return them.
        logits
            Last columns that the call must return; 0: all.

        Returns
        -------
        dict
            Arguments of the last chunk.
        """
        size, width = self.calls.state.chunk, forward.layout.width
        if size is None or width <= size:
            return kwargs
        if len(forward.segments) > 1:
            _one_pass(size, "this plan drops tokens between decoder layers, which need all rows")
            return kwargs
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            _one_pass(size, "the masks of windows or image blocks are made for the whole prompt")
            return kwargs
        rotary, forward.chunk = forward.rotary, size
        last = (width - 1) // size * size  # first column of the last chunk
        needed = not 0 < logits <= min(forward.tail, width - last)

        def chunk(start: int, stop: int) -> dict[str, Any]:
            forward.rotary = None if rotary is None else rotary[:, start:stop]
            return _chunk(kwargs, start, stop)

        for start in range(0, last, size):
            out = decoder.forward(**chunk(start, start + size))
            if needed:
                forward.earlier.append(out[0])
        return chunk(last, width)


def _chunk(kwargs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Arguments of the decoder for columns `start … stop - 1`."""
    x, mask, chunk = kwargs["inputs_embeds"], kwargs.get("attention_mask"), dict(kwargs)
    batch, width = x.shape[:2]
    chunk["inputs_embeds"] = x[:, start:stop]
    chunk["position_ids"] = kwargs["position_ids"][..., start:stop]
    if mask is not None:
        chunk["attention_mask"] = mask[:, : mask.shape[1] - (width - stop)]
    if kwargs.get("cache_position") is not None:
        chunk["cache_position"] = kwargs["cache_position"][start:stop]
    index = torch.arange(start, stop, device=x.device).expand(batch, -1)
    gather_arguments(chunk, index, None, width)
    return chunk


def whole_output(out: Any, earlier: list[Tensor]) -> Any:
    """The output of the last chunk, with the hidden states of the chunks before in front."""
    if not earlier:
        return out
    if isinstance(out, tuple):
        return (torch.cat([*earlier, out[0]], dim=1), *out[1:])
    out.last_hidden_state = torch.cat([*earlier, out.last_hidden_state], dim=1)
    return out


def _one_pass(size: Any, why: str) -> None:
    """Warn that a prompt is not chunked."""
    warnings.warn(
        f"prefill_chunk_size={size} is not applied to a prompt with media: {why}. The prompt runs "
        "in one pass. Use an entry reducer, or leave the option out.",
        PrefillWarning,
        stacklevel=3,
    )
