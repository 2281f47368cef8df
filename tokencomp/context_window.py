"""Visual context window extension: YaRN on the decoder's rotary embedding (arXiv 2409.20018).

The longest run of visual tokens in training is far shorter than the language context. The extension
scales rotary frequencies as YaRN does (arXiv 2309.00071), with the *visual* window in place of the
language window.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.errors import CopyError, OptionError, SpanError, UnsupportedModelError
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import Installed
from tokencomp.validation import fits

VISUAL_WINDOW = 6272  # LLaVA-OneVision was trained on 32 frames of 196 tokens
EXTENSION = "_tokencomp_window"  # attribute of a rotary embedding with its extension
HELD = "_tokencomp_visual"  # attribute of a KV cache with its number of visual tokens


class VisualContext(Installed):
    """An active extension of the visual window. Use it as a context manager, or call `remove()`.

    A forward call with more than `target_tokens` visual tokens raises `SpanError`. The longest
    sample of a batch counts in every call. If a cache was filled before the extension, all of its
    rows count as visual. Copying the model with `copy.deepcopy` or pickle raises `CopyError`.
    """

    def __init__(self, adapter: Adapter, base: float, window: int, target: int) -> None:
        self.factor = max(target / window, 1.0)  # by which low frequencies are divided
        # Largest number of visual tokens in a prompt before compression, including those that the
        # cache holds from earlier calls.
        self.target_tokens = target
        self._adapter, self._rotary = adapter, adapter.rotary
        self._local = threading.local()
        rotary: Any = self._rotary
        plain, scaling = self._plain = (rotary.inv_freq, rotary.attention_scaling)
        numbers = base, 2 * plain.numel(), window
        (stretched, attention), (usual, _) = (yarn(*numbers, f) for f in (self.factor, 1.0))
        rotary.inv_freq = plain.float() * (stretched / usual).to(plain.device)
        rotary.attention_scaling = scaling * attention
        setattr(rotary, EXTENSION, self)
        body = adapter.body
        self._handles += [
            body.register_forward_pre_hook(self._count, with_kwargs=True),
            body.register_forward_hook(self._note, with_kwargs=True),
        ]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CopyError(
            "the visual window of this model is extended: copy.deepcopy and pickle would copy "
            "scaled frequencies that nothing restores. Call tokencomp.unpatch(model) first, and "
            "call extend_visual_context() on the model and on its copy afterwards."
        )

    @property
    def in_force(self) -> bool:
        """Whether the extension is active, that is, neither removed nor replaced."""
        return getattr(self._rotary, EXTENSION, None) is self

    def remove(self) -> None:
        """Restore the rotary embedding. A second call has no effect."""
        rotary = self._rotary
        if self.in_force:
            delattr(rotary, EXTENSION)
            rotary.inv_freq = self._plain[0].to(rotary.inv_freq.device)
            rotary.attention_scaling = self._plain[1]
            super().remove()

    @compat.not_compiled
    def _count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the body: count the visual tokens of the call and of its cache."""
        named = compat.bind(module, args, kwargs)
        modalities = self._adapter.modalities(named)
        new = [] if modalities is None else (modalities != 0).sum(1).tolist()
        past, most = held(compat.get_cache(named)), max(new, default=0)
        self._local.total = past + most
        if most and past + most > self.target_tokens:
            cached = f", after {past} in the cache" if past else ""
            raise SpanError(
                f"sample {new.index(most)} has {most} visual tokens{cached}, and the visual window "
                f"was extended to {self.target_tokens}. Use fewer frames, or "
                f"extend_visual_context(model, {past + most})."
            )

    @compat.not_compiled
    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Hook of the body: store the count on the cache."""
        cache = compat.get_cache(compat.bind(module, args, kwargs), out)
        if cache is not None:
            setattr(cache, HELD, self._local.total)


def held(cache: Any) -> int:
    """Number of visual tokens in a KV cache.

    The stored number, but at most the length of the cache (after a crop); the length if no number
    is stored.
    """
    length = int(cache.get_seq_length()) if cache is not None else 0
    return min(getattr(cache, HELD, length), length)


def extend_visual_context(
    model: nn.Module, target_tokens: int, *, window: int = VISUAL_WINDOW
) -> VisualContext:
    """Extend the visual window of `model` to prompts of up to `target_tokens` visual tokens.

    Kept tokens keep their original positions, so the tokens of the *uncompressed* prompt count. The
    scaling concerns the whole sequence, text included, and its factor is the same for every prompt.

    Parameters
    ----------
    model
        A supported Hugging Face multimodal model, patched or not.
    target_tokens
        Longest visual input, in tokens before compression.
    window
        Longest run of visual tokens in the model's training. The default is that of
        LLaVA-OneVision. If `target_tokens` is not larger, the factor is 1.

    Returns
    -------
    VisualContext
        The extension. `remove()`, the end of a `with` block or `tokencomp.unpatch(model)` removes
        it, and another call replaces it.

    Raises
    ------
    OptionError
        If a count is not a positive whole number.
    UnsupportedModelError
        If no adapter supports the model, or its rotary embedding is scaled already.
    """
    from tokencomp.adapters.registry import adapter_for

    for name, value in (("target_tokens", target_tokens), ("window", window)):
        if not fits(value, int) or value < 1:
            raise OptionError(f"{name}={value!r}: expected a whole number of visual tokens, ≥ 1.")
    adapter = adapter_for(model)
    rotary: Any = adapter.rotary
    modality = getattr(rotary, "rope_type", "default")
    if modality not in ("default", "mrope"):
        raise UnsupportedModelError(
            f"the decoder's rotary embedding is already scaled (rope_type={modality!r}). Load the "
            "model without rope scaling to extend its visual window."
        )
    base = rope_base(adapter.text_config)
    restore_visual_context(model)
    return VisualContext(adapter, base, window, target_tokens)


def is_extended(adapter: Adapter) -> bool:
    return getattr(adapter.rotary, EXTENSION, None) is not None


def restore_visual_context(model: nn.Module) -> None:
    """Remove the extension of a model, if it has one."""
    for module in model.modules():
        context = getattr(module, EXTENSION, None)
        if context is not None:
            context.remove()


def yarn(base: float, dim: int, window: int, factor: float) -> tuple[Tensor, float]:
    """YaRN as transformers computes it: inverse frequencies, fp32 (dim / 2,), and `attention`.

    Pairs of dimensions that turn more than 32 times within the window do not change; pairs that
    turn less than once are divided by `factor`. For Qwen2 (base 1e6, d = 128) and a window of 6272
    the ramp between them runs over pairs 15 … 32. Cosine and sine are multiplied by `attention`.

    `base` belongs to the rotary frequencies of heads with `dim` dimensions, `window` is the number
    of positions in training, and `factor` is the target length / `window`, at least 1.
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
    """The base of a decoder's rotary frequencies, from its config.

    The stored frequencies are inexact if the model was cast to a lower precision.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    base = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    if base is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} names no rope_theta, so the frequencies to stretch are not "
            "known. Use a model with rotary positions."
        )
    return float(base)
