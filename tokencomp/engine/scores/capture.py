"""Queries and keys of any attention module, as its own code hands them to the attention backend.

A shallow copy of the module, whose config names a backend of ours, runs up to the call of that
backend. Projections, norms, rotary embeddings, scales, gates and latent projections are therefore
the module's own, whatever its family, and neither the module nor its config changes.

    module ─ shallow copy ─ q_proj, k_proj ─ norms ─ RoPE ─ backend(query, key, …)
                                                                │ `_capture` raises `Captured`
    caller ◄────────────────────────────────────────────────────┘ with query, key and scaling

The exception ends the copy's call before attention is computed, because nobody reads its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.adapters.structure import parameters_of
from tokencomp.engine.rows.compaction import take
from tokencomp.engine.scores.parallel import tensor_parallel_group, unwrapped
from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib import compat
from tokencomp.torchlib.views import AttributeView, shallow_copy

NAME = "tokencomp_capture"
FIX = "Use a reducer without attention, such as 'divprune'."
CHOICE = "prev_topk_indices"  # what the indexer of an earlier layer has chosen (GLM, Mistral)
SHARED = "shared_kv_states"  # keys and values of one layer that others read (Gemma 4)
# What changes the logits beyond scale and RoPE, as transformers passes it to a backend.
OTHER_LOGITS = ("softcap", "s_aux", "sinks", "position_bias")


@dataclass
class Captured(Exception):
    """Queries (S, heads, n, d), keys (S, kv heads, N, d), and the factor of their product."""

    query: Tensor
    key: Tensor
    scaling: float


def _capture(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """End the call with what a backend gets, in place of attention."""
    other = [name for name in OTHER_LOGITS if kwargs.get(name) is not None]
    if other:
        raise UnsupportedModelError(
            f"{type(module).__name__} changes attention logits by {', '.join(other)}, which "
            f"scores do not know. {FIX}"
        )
    raise Captured(query, key, query.shape[-1] ** -0.5 if scaling is None else float(scaling))


def _zeros(width: int, x: Tensor) -> Tensor:
    """In place of a projection whose result is not needed; only its width is."""
    return x.new_zeros(*x.shape[:-1], width)


def _some_rows(projection: Callable[[Tensor], Tensor], rows: Tensor, x: Tensor) -> Tensor:
    """A projection of `rows` (S, R) of its input alone; the other rows of the output are zeros."""
    out = projection(take([x], rows, [1])[0])
    index = rows[..., None].expand_as(out)
    return out.new_zeros(*x.shape[:2], out.shape[-1]).scatter_(1, index, out)


def _whole_batch(projection: nn.Module, batch: int, samples: slice | Tensor, x: Tensor) -> Tensor:
    """A projection of `samples` of a batch, called with zeros in place of the other samples."""
    whole = x.new_zeros(batch, *x.shape[1:])
    whole[samples] = x
    out: Tensor = projection(whole)[samples]
    return out


def _takes_more(module: nn.Module) -> bool:
    """Whether hooks hand further arguments to a module, as PEFT hands every sample's adapter."""
    return any(m._forward_pre_hooks_with_kwargs for m in module.modules())


def _constant(result: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of a projection whose result is known, and of an indexer that chooses nothing."""
    return result


class Past:
    """A cache that holds the rows of one sample in one layer, and forgets what is written to it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def get_seq_length(self, *args: Any) -> int:
        """Rows held."""
        return self.keys.shape[-2]

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The rows held, and new ones behind them."""
        return torch.cat([self.keys, key], dim=-2), torch.cat([self.values, value], dim=-2)


def attention_of(layer: nn.Module) -> Any:
    """The attention module of a decoder layer.

    Raises
    ------
    UnsupportedModelError
        The layer has none, as layers with a recurrence do, or one whose logits have a bias.
    """
    for name, child in unwrapped(layer).named_children():
        named = any(part in name for part in ("attn", "attention", "mixer"))
        if named and hasattr(unwrapped(child), "scaling"):
            if hasattr(unwrapped(child), "rel_extent"):
                raise UnsupportedModelError(
                    f"{type(unwrapped(child)).__name__} adds a bias by distance to its attention "
                    f"logits, which scores do not know. {FIX}"
                )
            return unwrapped(child)
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no attention module that scores could be read from. {FIX}"
    )


def capture_qk(
    root: Any,
    attn: Any,
    hidden: Tensor,
    arguments: Mapping[str, Any],
    skipped: Iterable[str] = (),
    rows: Tensor | None = None,
    projected: Tensor | None = None,
    samples: tuple[int, slice | Tensor] | None = None,
) -> Captured:
    """Queries and keys that `root`, called with `hidden` (S, n, d), computes in `attn`.

    Parameters
    ----------
    root
        `attn` itself, or the decoder layer around it.
    arguments
        Further arguments of the call, for these n columns.
    skipped
        Names of projections in `attn` whose results are not needed.
    rows : Tensor of int64, shape (S, R), or None
        Rows whose queries are needed; those of the others may be zeros. None: all.
    projected : Tensor, shape (S, n, width), or None
        What the projection `q_proj` of `attn` makes of `hidden`, if that is known.
    samples
        Samples in the model's batch, and those of them that `hidden` holds; None: all of them.

    Raises
    ------
    UnsupportedModelError
        The module does not call a backend that its config names, or changes logits in other ways.
    """
    compat.register_attention(NAME, _capture)
    clone = shallow_copy(attn)
    clone.config = AttributeView(attn.config, _attn_implementation=NAME)
    stand_ins: dict[str, partial[Any]] = {}
    if samples is not None:
        for name, child in attn.named_children():
            if _takes_more(child):
                stand_ins[name] = partial(_whole_batch, child, *samples)
    if tensor_parallel_group(attn) is None:  # else a rank's width is not the module's
        for name in skipped:
            width = getattr(getattr(attn, name, None), "out_features", None)
            if isinstance(width, int):
                stand_ins[name] = partial(_zeros, width)
    if projected is not None:
        stand_ins["q_proj"] = partial(_constant, projected)
    elif rows is not None and isinstance(getattr(attn, "q_proj", None), nn.Module):
        stand_ins["q_proj"] = partial(_some_rows, stand_ins.get("q_proj", attn.q_proj), rows)
    run = clone
    if root is not attn:
        run = shallow_copy(unwrapped(root))
        name = next(name for name, child in run.named_children() if unwrapped(child) is attn)
        run._modules[name] = clone
    call = {"attention_mask": None, **arguments}
    if getattr(attn, "indexer", None) is not None:  # its mask is read in front of the call
        stand_ins["indexer"] = partial(_constant, None)  # it changes neither queries nor keys
        call["attention_mask"] = hidden.new_ones(1, 1, 1, 1, dtype=torch.bool)
    if CHOICE in parameters_of(run) and call.get(CHOICE) is None:
        call[CHOICE] = hidden.new_zeros(1, 1, 1, dtype=torch.int32)
    if SHARED in parameters_of(run):  # a layer may write to it, and then later ones would read that
        call[SHARED] = dict(arguments.get(SHARED) or {})
    # Functions stand as attributes: torch's counter of FLOPs expects modules alone in `_modules`.
    for name, function in stand_ins.items():
        clone._modules.pop(name, None)
        clone.__dict__[name] = function
    try:
        type(run).forward(run, **compat.accepted(run, {"hidden_states": hidden, **call}))
    except Captured as captured:
        return captured.with_traceback(None)  # its frames hold all tensors of the call
    raise UnsupportedModelError(
        f"{type(attn).__name__} does not call the attention backend that its config names, so its "
        f"queries and keys are unknown. {FIX}"
    )
