"""YaRN: which rotary frequencies are stretched, and how far (arXiv 2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencomp.errors import UnsupportedModelError

BETA_FAST, BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN's numbers for one rotary embedding.

    Attributes
    ----------
    low, high
        Frequency pairs below `low` stay, above `high` are divided by `factor`, linear between.
    factor
        Target length / trained length, at least 1.
    attention
        What cos and sin are multiplied by: 0.1·ln(factor) + 1.
    """

    low: int
    high: int
    factor: float
    attention: float

    def frequencies(self, inv_freq: Tensor) -> Tensor:
        """Stretched inverse frequencies, fp32, shape (d / 2,)."""
        place = torch.arange(inv_freq.numel(), device=inv_freq.device, dtype=torch.float32)
        # the published code avoids a ramp of no width the same way
        ramp = ((place - self.low) / max(self.high - self.low, 1e-3)).clamp(0, 1)
        return inv_freq.float() * (1 - ramp + ramp / self.factor)


def yarn(base: float, dim: int, window: float, factor: float) -> Yarn:
    """YaRN for rotary base `base` and head dimension `dim`, trained on `window` positions.

    For Qwen2 (base 1e6, d = 128) and window 6272 the ramp runs over dims 15 … 32.
    """

    def pair(rotations: float) -> float:
        return dim * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(BETA_FAST)), 0), min(math.ceil(pair(BETA_SLOW)), dim - 1)
    return Yarn(low, high, factor, 0.1 * math.log(factor) + 1.0)


def rope_base(config: Any) -> float:
    """Base of a decoder's rotary frequencies, from its config (a cast rounds the frequencies).

    Raises
    ------
    UnsupportedModelError
        The config names none.
    """
    given = getattr(config, "rope_parameters", None) or {}  # transformers 5
    base = given.get("rope_theta", getattr(config, "rope_theta", None))
    if base is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} names no rope_theta, so the frequencies to stretch are not "
            "known. Use a model with rotary positions."
        )
    return float(base)
