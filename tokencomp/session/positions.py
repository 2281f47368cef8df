"""Positions of the parts of a conversation: each continues after the one before."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor

from tokencomp.adapters.base import Adapter
from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib import compat

ALONG = ("input_ids", "attention_mask", "mm_token_type_ids")


class Positions:
    """The positions that the model would compute for the whole conversation as one prompt.

    With M-RoPE the model computes positions of one part from 0 on. They are shifted after the
    largest position so far, as the model does after an image. This is checked, on a part that is
    repeated in one prompt: models that count seconds or frames along one axis go on before the
    largest position after a long clip of small frames. `following` is the position of the next
    token.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter, self.following = adapter, 0
        if adapter.mrope and (
            adapter.mrope_rows > 3 or not hasattr(adapter.body, "get_rope_index")
        ):
            raise UnsupportedModelError(
                f"{type(adapter.body).__name__} takes {adapter.mrope_rows} rows of positions and "
                "does not say how they continue after an image (get_rope_index), so a session "
                "could not place its later turns. Give the whole conversation as one prompt."
            )

    def of(self, inputs: Mapping[str, Tensor], modalities: Tensor | None) -> tuple[Tensor, int]:
        """Positions of a part, and the position that follows it.

        int64 (3, 1, n) for M-RoPE, else (1, n). `inputs` are those of one sample; for `modalities`
        (1, n) see `Adapter.modalities`, None for text.
        """
        ids = inputs["input_ids"]
        own = torch.arange(ids.shape[1], device=ids.device)[None]
        if self._adapter.mrope:
            own = own.expand(3, 1, -1)
            if modalities is not None:
                own = self._local(inputs, modalities)
                self._check(inputs, modalities, own)
        moved = own + self.following
        return moved, int(moved.max()) + 1

    def _local(self, inputs: Mapping[str, Tensor], modalities: Tensor, copies: int = 1) -> Tensor:
        """Positions from 0 on of a prompt that repeats a part `copies` times."""
        body = self._adapter.body
        names = inspect.signature(body.get_rope_index).parameters
        grids = {k: v for k, v in inputs.items() if k in names and k not in ALONG}
        grids = {k: torch.cat([v] * copies) for k, v in grids.items()}
        types = inputs.get("mm_token_type_ids", modalities.int())
        ids, types = (torch.cat([t] * copies, 1) for t in (inputs["input_ids"], types))
        return compat.rope_index(body, ids, types, **grids)

    def _check(self, inputs: Mapping[str, Tensor], modalities: Tensor, own: Tensor) -> None:
        twice = self._local(inputs, modalities, copies=2)
        if not torch.equal(twice, torch.cat([own, own + own.max() + 1], -1)):
            raise UnsupportedModelError(
                f"{type(self._adapter.body).__name__} does not place what follows this image or "
                "video after its largest position, so a session could not place later turns. "
                "Append a long clip in shorter ones, or give the whole conversation as one prompt."
            )
