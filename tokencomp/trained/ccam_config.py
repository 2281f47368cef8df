"""Sizes of a ccam projector, as a dataclass and on the card of its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError, WeightsError
from tokencomp.validation import check_types


@dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of a projector; the defaults are those of Video-CCAM-7B v1.2 (SigLIP and Qwen2-7B).

    Attributes
    ----------
    queries
        Number of output tokens, for an input of any length.
    width, heads, mlp
        Inner width, number of attention heads, and hidden size of the SwiGLU.
    kv_dim, out_dim
        Width of the visual tokens and width of the language model.
    causal
        If True, query i of Q sees the frames up to floor(i·F/Q); with more frames than queries, no
        query sees the last ⌈F/Q⌉ - 1 frames. If False, every query sees every frame.
    spatial
        Whether fixed 2-D sine positions of the cells in a frame are added to the keys (ours). This
        is needed if features do not encode their place, as after towers with rotary positions.
    eps
        Epsilon of the layer norms.

    Raises
    ------
    OptionError
        If a value has another type, a size is below one, or `heads` does not divide `width`.
    """

    queries: int = 1024
    width: int = 1024
    heads: int = 16
    mlp: int = 4096
    kv_dim: int = 1152
    out_dim: int = 3584
    causal: bool = True
    spatial: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_types("ccam", self)
        for name in ("queries", "width", "heads", "mlp", "kv_dim", "out_dim", "eps"):
            if getattr(self, name) <= 0:
                raise OptionError(f"ccam: {name}={getattr(self, name)}; must be above 0.")
        if self.width % self.heads:
            raise OptionError(
                f"ccam: width={self.width}, heads={self.heads}; width must be a multiple of heads."
            )


def read_card(path: Path) -> tuple[dict[str, Any], ProjectorConfig]:
    """Read the card of the projector in `path` and its sizes, without the tensors.

    Raises
    ------
    WeightsError
        If the card is missing or damaged, or its sizes are not valid.
    """
    try:
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return card, ProjectorConfig(**card["ccam"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise misfit(path, error) from error


def misfit(path: Path, why: object) -> WeightsError:
    """Return the error for files in `path` that do not contain a projector."""
    return WeightsError(
        f"{path} and its card {path.stem}.json do not hold a ccam projector ({why}). Copy both "
        "files of a finished training run."
    )
