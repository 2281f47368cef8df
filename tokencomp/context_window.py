"""Visual context window extension: YaRN on the decoder's rotary embedding (arXiv 2409.20018).

A model has been trained on far fewer visual tokens in a row than its language context is long.
Rotary frequencies are stretched as YaRN does (arXiv 2309.00071), with the *visual* window in place
of the language window.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokencomp.engine import compat
from tokencomp.errors import CopyError, OptionError, SpanError, UnsupportedModelError
from tokencomp.yarn import Yarn, rope_base, yarn

if TYPE_CHECKING:
    from torch import Tensor

    from tokencomp.adapters.base import Adapter

VISUAL_WINDOW = 6272  # 32 frames of 196 tokens: LLaVA-OneVision
EXTENSION = "_tokencomp_window"  # where a rotary embedding keeps its extension
HELD = "_tokencomp_visual"  # where a KV cache keeps how many visual tokens it holds


class VisualContext:
    """A stretched visual window in force. Use as a context manager, or call `remove()`.

    Attributes
    ----------
    yarn : Yarn
        What was done to the frequencies.
    target_tokens
        Visual tokens that fit, patched or not, those in the cache from earlier calls included.

    Raises
    ------
    SpanError
        In a forward call that brings more. Of a batch the longest sample counts, in every call;
        of a cache that was filled before the extension every row. Models of VILA's remote code
        show their visual tokens to an active patch alone.
    CopyError
        On `copy.deepcopy` or pickling of the model.
    """

    def __init__(self, adapter: Adapter, numbers: Yarn, target: int) -> None:
        self.yarn, self.target_tokens = numbers, target
        self._adapter, self._rotary = adapter, adapter.decoder.rotary_emb
        self._local = threading.local()
        rotary, body = self._rotary, adapter.body
        self._before = (rotary.inv_freq, rotary.attention_scaling)
        rotary.inv_freq = numbers.frequencies(rotary.inv_freq)
        rotary.attention_scaling = rotary.attention_scaling * numbers.attention
        setattr(rotary, EXTENSION, self)
        self._hooks = (
            body.register_forward_pre_hook(self._count_placeholders, with_kwargs=True),
            body.register_forward_hook(self._note, with_kwargs=True),
        )

    def __enter__(self) -> VisualContext:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CopyError(
            "the visual window of this model is extended: copy.deepcopy and pickle would copy "
            "stretched frequencies that nothing restores. Call tokencomp.unpatch(model) first, and "
            "extend_visual_context() the model and its copy afterwards."
        )

    @property
    def in_force(self) -> bool:
        """Neither removed nor replaced."""
        return getattr(self._rotary, EXTENSION, None) is self

    def remove(self) -> None:
        """Restore the rotary embedding. Safe to call twice."""
        rotary = self._rotary
        if self.in_force:
            delattr(rotary, EXTENSION)
            rotary.inv_freq = self._before[0].to(rotary.inv_freq.device)
            rotary.attention_scaling = self._before[1]
            for hook in self._hooks:
                hook.remove()

    def count(self, new: list[int], cache: Any) -> None:
        """Add the visual tokens `new` of every sample of a call to those that `cache` holds.

        Raises
        ------
        SpanError
            A sample has more visual tokens than `target_tokens`.
        """
        past, most = held(cache), max(new, default=0)
        self._local.total = past + most
        if most and past + most > self.target_tokens:
            told = f", after {past} in the cache" if past else ""
            raise SpanError(
                f"sample {new.index(most)} has {most} visual tokens{told}, and the visual window "
                f"was extended to {self.target_tokens}. Give fewer frames, or "
                f"extend_visual_context(model, {past + most})."
            )

    @torch.compiler.disable
    def _count_placeholders(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named = compat.bind(module, args, kwargs)
        kinds = self._adapter.kinds(named)
        new = [] if kinds is None else (kinds != 0).sum(1).tolist()
        self.count(new, compat.get_cache(named))

    @torch.compiler.disable
    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        cache = compat.get_cache(compat.bind(module, args, kwargs), out)
        if cache is not None:
            setattr(cache, HELD, self._local.total)


def held(cache: Any) -> int:
    """Visual tokens in a KV cache: what was noted, and at most its length."""
    length = int(cache.get_seq_length()) if cache is not None else 0
    return min(getattr(cache, HELD, length), length)


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
    base, dim = rope_base(adapter.text_config), 2 * rotary.inv_freq.numel()
    numbers = yarn(base, dim, window, max(target_tokens / window, 1.0))
    restore_visual_context(model)
    return VisualContext(adapter, numbers, target_tokens)


def is_extended(adapter: Adapter) -> bool:
    """Whether the visual window of the adapter's model is extended."""
    return getattr(adapter.decoder.rotary_emb, EXTENSION, None) is not None


def restore_visual_context(model: nn.Module) -> None:
    """Undo the extension of this model, if there is one."""
    for module in model.modules():
        context = getattr(module, EXTENSION, None)
        if context is not None:
            context.remove()


def check_window(adapter: Adapter, kinds: Tensor, cache: Any) -> None:
    """Count the visual tokens of a patched call by their `kinds`, shape (B, L), 0 at text.

    Raises
    ------
    SpanError
        A sample has more visual tokens than an extended window holds.
    """
    context = getattr(adapter.decoder.rotary_emb, EXTENSION, None)
    if context is not None:
        context.count((kinds != 0).sum(1).tolist(), cache)
