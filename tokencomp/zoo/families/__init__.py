"""How each tiny model is built. One family is one file; training code knows none by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from tokencomp.errors import UnknownNameError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

    from tokencomp.zoo.families.parts import Encode

FAMILIES = {
    "tiny-qwen2-vl": ".qwen2_vl",
    "tiny-qwen3-vl": ".qwen3_vl",
    "tiny-qwen3-5": ".qwen3_5",
    "tiny-gemma3": ".gemma3",
    "tiny-llava-onevision": ".llava_onevision",
    "tiny-vila": ".vila",
}


class Family(Protocol):
    """What training, evaluation and packing need to know of an architecture."""

    chat_template: str
    cell: int
    """Side in pixels of the square that one token of :meth:`tokens` covers in training."""
    special_tokens: tuple[str, ...]
    """Special tokens of the vocabulary, in the order of their ids."""
    token_names: dict[str, str]
    """Special tokens that the processor looks up by a name, such as "boi_token"."""
    kinds: tuple[str, ...]
    """Media that its processor takes: "image", "video"."""
    corpus: tuple[str, ...]
    """Text that the tokenizer is trained on beside that of all families."""
    text_folder: str
    """Where the tokenizer lies in the model folder: "" is the folder itself."""
    card: dict[str, str]
    """What the model card says differently: see :data:`~tokencomp.zoo.card.USUAL`."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files."""

    def build(self, tokenizer) -> torch.nn.Module:
        """A freshly initialised stock HF model for the vocabulary of ``tokenizer``."""

    def files(self, tokenizer) -> dict[str, dict[str, Any]]:
        """Configuration files of the HF folder, by file name (with its subfolder)."""

    def weight_name(self, name: str) -> str:
        """Name of a parameter in published checkpoints; "folder/name" in a sub-checkpoint."""

    def hidden(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        """Last hidden states (batch, length, hidden) for model inputs, without the head."""

    def parts(self, model) -> dict[str, torch.nn.Module]:
        """Modules that a model of another family may start from, by what they are."""

    def expand(
        self, ids, kind: str, shape: tuple[int, int, int], encode: Encode, fps: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Expand the one placeholder in ``ids`` for media of (frames, height, width) px.

        ``encode`` and ``fps`` are for families that write the time before each frame of a video.
        Returns ids (n,) and positions (rows, n), both int64.
        """

    def pixels(self, frames: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
        """Model inputs for uint8 frames (batch, frames, height, width, 3).

        The same numbers as the HF processor gives, computed for the whole batch at once.
        """

    def tokens(self, model, frames: torch.Tensor, kind: str) -> torch.Tensor:
        """Projected tokens (batch, t, rows, columns, hidden), before pooling, none special.

        ``t`` is 1 where a token covers a pair of frames, else the number of frames.
        """

    def vision_parameters(self, model) -> list[torch.nn.Parameter]:
        """Vision tower and projector."""

    def language_config(self, model) -> Any:
        """Config of the text decoder."""

    def tokens_per(self, kind: str, shape: tuple[int, int, int]) -> int:
        """Visual tokens of one image or video of (frames, height, width) px."""


def family(name: str) -> Family:
    """Load the family of a tiny model by name.

    Raises
    ------
    UnknownNameError
        For a name that has no builder.
    """
    if name not in FAMILIES:
        raise UnknownNameError(f"No tiny model {name!r} can be built. Choose one of {[*FAMILIES]}.")
    return importlib.import_module(FAMILIES[name], __name__).FAMILY
