"""Sizes of a ccam projector, in code and on its card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.errors import OptionError, WeightsError
from tokencomp.validation import check_types


@dataclass(frozen=True)
class CCAMConfig:
    """Sizes of a projector.

    Attributes
    ----------
    queries
        Tokens that come out, whatever goes in.
    width, heads, mlp
        Inner width, attention heads, hidden size of the SwiGLU.
    kv_dim, out_dim
        Width of the visual tokens, and of the language model.
    causal
        Query i of Q sees frames up to floor(i·F/Q), so that of more frames than queries the last
        ⌈F/Q⌉ - 1 are seen by none; False: every query sees every frame.
    spatial
        Add fixed 2-D sine positions of the place in the frame to the keys (ours). Needed where
        features do not carry their place, as after towers with rotary positions.
    eps
        Of the layer norms.

    Raises
    ------
    OptionError
        A value of another type, a size below one, or a width that heads do not divide.
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


PRESETS = {
    # 7B v1.2: SigLIP-SO400M hidden_states[-2] in, Qwen2-7B out.
    "video-ccam-7b-v1.2": CCAMConfig(),
}


def read_card(path: Path) -> tuple[dict[str, Any], CCAMConfig]:
    """Card and sizes of the projector in `path`, without its tensors.

    Raises
    ------
    WeightsError
        The card is missing or broken, or its sizes are none that a projector can have.
    """
    try:
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return card, CCAMConfig(**card["ccam"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise misfit(path, error) from error


def misfit(path: Path, why: object) -> WeightsError:
    """The error for files in `path` that hold no projector."""
    return WeightsError(
        f"{path} and its card {path.stem}.json do not hold a ccam projector ({why}). Copy both "
        "files of a finished training run."
    )
