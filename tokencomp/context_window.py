"""Visual context window extension: YaRN on the decoder's rotary embedding (arXiv 2409.20018).

A model has been trained on far fewer visual tokens in a row than its language context is long.
Rotary frequencies are stretched as YaRN does (arXiv 2309.00071), with the *visual* window in place
of the language window.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokencomp.errors import OptionError, SpanError, UnsupportedModelError

if TYPE_CHECKING:
    from tokencomp.context import VisualSpan

VISUAL_WINDOW = 6272  # 32 frames of 196 tokens: LLaVA-OneVision
BETA_FAST, BETA_SLOW = 32.0, 1.0
_EXTENDED: weakref.WeakKeyDictionary[nn.Module, VisualContext] = weakref.WeakKeyDictionary()


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


class VisualContext:
    """A stretched visual window in force. Use as a context manager, or call `remove()`."""

    def __init__(self, model: nn.Module, rotary: Any, numbers: Yarn, target: int) -> None:
        self.yarn, self.target_tokens = numbers, target
        self._model, self._rotary = weakref.ref(model), weakref.ref(rotary)
        self._before = (rotary.inv_freq, rotary.attention_scaling)
        rotary.inv_freq = numbers.frequencies(rotary.inv_freq)
        rotary.attention_scaling = rotary.attention_scaling * numbers.attention

    def __enter__(self) -> VisualContext:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the rotary embedding. Safe to call twice."""
        model, rotary = self._model(), self._rotary()
        if model is not None and rotary is not None and _EXTENDED.get(model) is self:
            del _EXTENDED[model]
            rotary.inv_freq = self._before[0].to(rotary.inv_freq.device)
            rotary.attention_scaling = self._before[1]


def extend_visual_context(
    model: nn.Module, target_tokens: int, *, window: int = VISUAL_WINDOW
) -> VisualContext:
    """Let `model` read prompts of up to `target_tokens` visual tokens.

    Kept tokens keep their original positions, so count the tokens of the *uncompressed* prompt.
    The whole sequence, text included, is rescaled; the factor is the same for every prompt.

    Parameters
    ----------
    model
        A supported Hugging Face multimodal model, patched or not.
    target_tokens
        Longest visual input, in tokens.
    window
        Visual tokens in a row that the model was trained on; the default is LLaVA-OneVision's.
        At most `window` tokens need no stretching: the factor is then 1.

    Returns
    -------
    VisualContext
        Undo with `remove()`, a `with` block, or `tokencomp.unpatch(model)`. Calling again replaces
        the earlier extension.

    Raises
    ------
    OptionError
        Counts that are not positive whole numbers.
    UnsupportedModelError
        No adapter serves the model, or its rotary embedding is scaled already.
    """
    from tokencomp.adapters.base import adapter_for

    for name, value in (("target_tokens", target_tokens), ("window", window)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{name}={value!r}: expected a whole number of visual tokens, ≥ 1.")
    adapter = adapter_for(model)
    rotary: Any = adapter.decoder.rotary_emb
    kind = getattr(rotary, "rope_type", "default")
    if kind not in ("default", "mrope"):
        raise UnsupportedModelError(
            f"the decoder's rotary embedding is already scaled (rope_type={kind!r}). Load the "
            "model without rope scaling to extend its visual window."
        )
    restore_visual_context(adapter.model)
    inv_freq = rotary.inv_freq.double()
    dim = 2 * inv_freq.numel()
    base = float(inv_freq[-1]) ** (-dim / (dim - 2))
    factor = max(target_tokens / window, 1.0)
    numbers = yarn(base, dim, window, factor)
    _EXTENDED[adapter.model] = context = VisualContext(
        adapter.model, rotary, numbers, target_tokens
    )
    return context


def restore_visual_context(model: nn.Module) -> None:
    """Undo the extension of this model, if there is one."""
    context = _EXTENDED.get(model)
    if context is not None:
        context.remove()


def check_window(model: nn.Module, spans: list[list[VisualSpan]]) -> None:
    """Refuse prompts with more visual tokens than an extended window holds.

    Raises
    ------
    SpanError
        A sample has more visual tokens than `target_tokens`.
    """
    context = _EXTENDED.get(model)
    if context is None:
        return
    for row, sample in enumerate(spans):
        tokens = sum(s.visual for s in sample)
        if tokens > context.target_tokens:
            raise SpanError(
                f"sample {row} has {tokens} visual tokens, and the visual window was extended to "
                f"{context.target_tokens}. Give fewer frames, or extend_visual_context(model, "
                f"{tokens})."
            )
