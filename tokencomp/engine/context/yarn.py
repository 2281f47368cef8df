"""YaRN, which scales the low frequencies of a rotary embedding (arXiv 2309.00071)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokencomp.errors import UnsupportedModelError


def yarn(base: float, dim: int, window: int, factor: float) -> tuple[Tensor, float]:
    """YaRN as transformers computes it: inverse frequencies, fp32 (dim / 2,), and `attention`.

    Pairs of dimensions that turn more than 32 times within the window do not change, and those that
    turn less than once are divided by `factor`. For Qwen2 (base 1e6, d = 128) and a window of 6272
    the ramp between them runs over pairs 15 … 32. Cosine and sine are multiplied by `attention`.

    The rotary frequencies have this base, for heads of `dim` dimensions. `window` are the positions
    in training, and `factor` is the target length / `window`, at least 1.
    """
    from transformers import Qwen2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": window}
    options: dict[str, Any] = {
        "hidden_size": dim,
        "num_attention_heads": 1,
        "max_position_embeddings": round(window * factor),
        "rope_theta": base,
        "rope_scaling": scaling,
    }
    inv_freq, attention = ROPE_INIT_FUNCTIONS["yarn"](Qwen2Config(**options), "cpu")
    return inv_freq, attention


def rope_base(config: Any) -> float:
    """The base of a decoder's rotary frequencies from its config.

    The frequencies of the model itself are not exact if the model was cast to a lower precision.
    """
    parameters = getattr(config, "rope_parameters", None) or {}  # transformers 5
    base = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    if base is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} names no rope_theta, so the frequencies to stretch are not "
            "known. Use a model with rotary positions."
        )
    return float(base)
