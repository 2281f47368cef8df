"""Refuses models of other methods, and prompts in which nothing can be compressed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from tokencomp.adapters.base import Adapter
from tokencomp.errors import (
    AlreadyCompressedError,
    NoVisualInputError,
    OptionError,
    UncompressedWarning,
    UnsupportedModelError,
)
from tokencomp.torchlib.checkpointing import checkpointed_since
from tokencomp.torchlib.replace import MethodReplacement

TRACED = (
    "a prompt with media was traced (torch.export, torch.jit.trace, torch.func). Which tokens it "
    "keeps follows from their values, so that no trace holds for other prompts. Use torch.compile, "
    "or trace under handle.disabled()."
)
PREPARED = "_original_forward"  # where Accelerator.prepare keeps what mixed precision wraps


def refuse_foreign(model: nn.Module) -> None:
    """Raise `AlreadyCompressedError` if another compression method has changed the model."""
    config = getattr(model, "config", None)
    changes = [
        name
        for name in ("fastv_config", "use_fast_v", "video_pruning_rate", "image_pruning_rate")
        if getattr(config, name, None) and not hasattr(model, name)  # else the model's own
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
    """Whether `module.forward` was replaced by accelerate, or by torch.compile of the original.

    What accelerate has unwrapped may be the original without its decorators.
    """
    own = module.__dict__
    originals: list[Any] = [type(module).forward]
    while (inner := getattr(originals[-1], "__wrapped__", None)) is not None:
        originals.append(inner)
    forward = getattr(own["forward"], "_torchdynamo_orig_callable", None) or own["forward"]
    while forward is not None:
        original = getattr(forward, "__func__", forward) in originals
        if original or MethodReplacement.replaces(forward):
            return True
        forward = getattr(forward, "__wrapped__", None) if PREPARED in own else None
    return "_old_forward" in own


CHECKPOINTED = "_checkpoint_wrapped_module."
"""Before the names of modules within torch's `CheckpointWrapper`."""


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a decoder that make rotary tables, known by their inverse frequencies.

    Raises
    ------
    UnsupportedModelError
        A layer, or a list with one for every layer, holds such a module. The tables of layers would
        have to be looked up one by one.
    """
    found = {
        name: module
        for name, module in decoder.named_modules()
        if any("inv_freq" in buffer for buffer, _ in module.named_buffers(recurse=False))
    }
    if nested := [name for name in found if "." in name.removeprefix(CHECKPOINTED)]:
        raise UnsupportedModelError(
            f"the layers of {type(decoder).__name__} take rotary tables of {nested[0]}. Served are "
            "text decoders whose rotary modules are attributes of the decoder, such as rotary_emb. "
            "Run it without patch()."
        )
    return list(found.values())


def refuse_recomputation(
    module: nn.Module, lost: str, fix: str = "", certain: bool = False
) -> None:
    """Refuse code that a backward pass would run once more without what is `lost` by then.

    Parameters
    ----------
    module
        Its call is running. What checkpoints it as a whole runs it again as a whole.
    certain
        Whether it is certain that the code will run once more; else that is looked up.

    Raises
    ------
    OptionError
        Something within the call of `module` checkpoints the code that calls this function.
    """
    if certain or checkpointed_since(module):
        raise OptionError(
            f"activation checkpointing within {type(module).__name__}: the backward pass would "
            f"run a part of it once more without {lost}, and give other gradients. Checkpoint its "
            f"decoder layers with model.gradient_checkpointing_enable(){fix}."
        )


class FeaturelessPrompts:
    """Lets prompts that bring no features run uncompressed, or refuses them.

    Parameters
    ----------
    strict
        Whether they are refused.
    """

    def __init__(self, adapter: Adapter, strict: bool) -> None:
        self.adapter, self.strict = adapter, strict
        self._warned = False

    def meet(self, arguments: Mapping[str, Any]) -> None:
        """Warn, once per patch, that a prompt with media runs uncompressed, and why.

        Raises
        ------
        NoVisualInputError
            `strict=True`: a prompt must bring features.
        """
        if self.strict:
            raise NoVisualInputError(
                "strict=True and this prompt brings no image or video, so nothing can be "
                "compressed. Pass pixel_values / pixel_values_videos; beside inputs_embeds with "
                "features in place pass mm_token_type_ids (0 text, 1 image, 2 video) too; or use "
                "patch(..., strict=False)."
            )
        if self._warned:
            return
        why = ""
        if self.adapter.hides_features(arguments):
            why = (
                "a prompt came as inputs_embeds without pixels. If image or video features already "
                "stand in it, they run uncompressed, because their columns are unknown. "
                "Pass mm_token_type_ids (0 text, 1 image, 2 video) beside it."
            )
        elif self.adapter.has_placeholders(arguments):
            why = (
                "a prompt has placeholders of media and no pixels. The model reads them as text, "
                "and nothing is compressed. Pass all that the processor returns: model(**inputs)."
            )
        if why:
            self._warned = True
            message = f"{why} This warning appears once per patch."
            warnings.warn(message, UncompressedWarning, stacklevel=2)
