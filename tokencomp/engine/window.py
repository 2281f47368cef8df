"""Attention windows of models whose config names one without naming the kinds of layers."""

from __future__ import annotations

from typing import Any

from tokencomp.errors import UnsupportedModelError


def attention_window(config: Any, cache: Any) -> int | None:
    """How many tokens a decoder row attends to at most; None: all.

    If the config has `layer_types`, they decide, and adapters refuse layers with a window when the
    model is patched. Without them, Mistral's layers have the window that `sliding_window` names,
    Llama's ignore it, and the default KV cache cuts its rows to it in both.
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) or getattr(config, "use_sliding_window", True) is False:
        window = None
    layers = getattr(cache, "layers", None) or ()
    windows = [window, *(getattr(layer, "sliding_window", None) for layer in layers)]
    return min((int(w) for w in windows if w is not None), default=None)


def check_attention_window(config: Any, cache: Any, length: int) -> None:
    """Refuse a compressed sequence that is longer than an attention window.

    Inside of the window all rows are seen, and dropping equals masking. Beyond it, attention and
    caches count rows, of which there are fewer now: tokens that the full model no longer sees
    would be seen again.

    Parameters
    ----------
    config
        Of the decoder.
    cache
        The KV cache of the call, or None.
    length
        Tokens of the sequence after this call, in the positions that the rotary embedding uses:
        dropped ones count unless positions are compact.

    Raises
    ------
    UnsupportedModelError
        The window is not longer than the sequence.
    """
    window = attention_window(config, cache)
    if window is not None and length >= window:
        raise UnsupportedModelError(
            f"the sequence has {length} tokens, and the decoder attends to the last {window} only "
            f"(sliding_window={window} of its config or cache). Compressed prompts must stay below "
            f"the window: give fewer than {window} tokens in all, or turn compression off with "
            "handle.disabled(). If no layer of the model reads it (Llama), set "
            "model.config.get_text_config().sliding_window = None."
        )
