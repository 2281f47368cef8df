"""YaRN, which scales the low frequencies of a rotary embedding (arXiv 2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokencomp.errors import UnsupportedModelError

# Rotations within the trained window: pairs with more than BETA_FAST do not change, and pairs with
# fewer than BETA_SLOW are scaled in full.
BETA_FAST, BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Yarn:
    """Parameters of YaRN for one rotary embedding.

    Attributes
    ----------
    low, high
        Frequency pairs below `low` do not change, and pairs above `high` are divided by `factor`.
        Between them the share of the scaled frequency grows linearly.
    factor
        Target length / trained length, at least 1.
    attention
        Factor of cos and sin: 0.1·ln(factor) + 1.
    """

    low: int
    high: int
    factor: float
    attention: float

    def frequencies(self, inv_freq: Tensor) -> Tensor:
        """Return the scaled inverse frequencies, fp32, shape (d / 2,)."""
        place = torch.arange(inv_freq.numel(), device=inv_freq.device, dtype=torch.float32)
        # A ramp without width would divide by 0; the published code uses the same minimum.
        ramp = ((place - self.low) / max(self.high - self.low, 1e-3)).clamp(0, 1)
        return inv_freq.float() * (1 - ramp + ramp / self.factor)


def yarn(base: float, dim: int, window: float, factor: float) -> Yarn:
    """Compute the parameters of YaRN.

    For Qwen2 (base 1e6, d = 128) and a window of 6272 the ramp runs over pairs 15 … 32.

    Parameters
    ----------
    base
        Base of the rotary frequencies.
    dim
        Head dimension.
    window
        Number of positions in training.
    factor
        Target length / trained length, at least 1.
    """

    def pair(rotations: float) -> float:
        """Index of the frequency pair that makes `rotations` turns within the window."""
        return dim * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(BETA_FAST)), 0), min(math.ceil(pair(BETA_SLOW)), dim - 1)
    return Yarn(low, high, factor, 0.1 * math.log(factor) + 1.0)


def rope_base(config: Any) -> float:
    """Return the base of a decoder's rotary frequencies from its config.

    The frequencies of the model itself are not exact if the model was cast to a lower precision.

    Raises
    ------
    UnsupportedModelError
        If the config has no base.
    """
    parameters = getattr(config, "rope_parameters", None) or {}  # transformers 5
    base = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    if base is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} names no rope_theta, so the frequencies to stretch are not "
            "known. Use a model with rotary positions."
        )
    return float(base)
