"""Refuses what cannot be compressed exactly, with the fix, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokencomp.adapters.base import Adapter
from tokencomp.errors import (
    AlreadyCompressedError,
    OptionError,
)
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import MethodReplacement

PREPARED = "_original_forward"  # where Accelerator.prepare keeps what mixed precision wraps


def check_prefill(
    adapter: Adapter,
    kwargs: Mapping[str, Any],
    kinds: Tensor,
    between_layers: bool,
) -> None:
    """Look at the arguments of a decoder call with visual tokens.

    Parameters
    ----------
    kinds : Tensor, shape (B, L)
        Of the prompt, see `Adapter.kinds`.
    between_layers
        Whether tokens leave between layers.

    Raises
    ------
    AlreadyCompressedError, OptionError
    """
    shape = kwargs["inputs_embeds"].shape[:2]
    if shape != kinds.shape:
        raise AlreadyCompressedError(
            f"the decoder got {tuple(shape)} tokens for a prompt of {tuple(kinds.shape)}: "
            "something else already shortened it. Undo the other method before patch()."
        )
    if compat.recomputed(adapter.layers[0]):
        _check_recomputation(between_layers)


def _check_recomputation(between_layers: bool) -> None:
    """Refuse what a checkpointed layer would compute in another way in the backward pass."""
    fix = "or model.gradient_checkpointing_disable()."
    if between_layers and compat.recomputes_hooks():
        raise OptionError(
            "gradient checkpointing with tokens dropped between layers: this transformers release "
            "would drop them again in the backward pass. Use transformers >= 5.23, an entry "
            f"reducer, {fix}"
        )


def refuse_foreign(model: nn.Module) -> None:
    """Raise `AlreadyCompressedError` if another compression method has changed the model."""
    config = getattr(model, "config", None)
    changes = [
        name
        for name in ("fastv_config", "use_fast_v", "video_pruning_rate", "image_pruning_rate")
        if getattr(config, name, None)
    ]
    changes += [name for name in ("_info", "_tome_info") if name in model.__dict__]
    for name in ("get_image_features", "get_video_features", "forward"):
        for module in (model, getattr(model, "model", None)):
            own = getattr(module, "__dict__", {})
            if name not in own or MethodReplacement.replaces(own[name]):
                continue
            if not (name == "forward" and _only_wrapped(module)):
                changes.append(f"{type(module).__name__}.{name} replaced")
    if changes:
        raise AlreadyCompressedError(
            f"{type(model).__name__} carries another method's changes ({', '.join(changes)}). "
            "Load a fresh model, or undo the other method first."
        )


def _only_wrapped(module: Any) -> bool:
    """Whether `module.forward` was replaced by accelerate, or by torch.compile of the original."""
    own = module.__dict__
    forward = getattr(own["forward"], "_torchdynamo_orig_callable", None) or own["forward"]
    while forward is not None:
        original = getattr(forward, "__func__", None) is type(module).forward
        if original or forward is type(module).forward or MethodReplacement.replaces(forward):
            return True
        forward = getattr(forward, "__wrapped__", None) if PREPARED in own else None
    return "_old_forward" in own
