"""Capture queries and keys of any attention module, as it passes them to its attention backend.

A shallow copy of the module, whose config names a backend of ours, runs up to the call of that
backend. Projections, norms, rotary embedding, scales and gates are thus those of the module,
whatever its family, and neither the module nor its config changes.

    module ─ shallow copy ─ q_proj, k_proj ─ norms ─ RoPE ─ backend(query, key, …)
                                                            │ `_capture` raises `Captured`
    caller ◄────────────────────────────────────────────────────┘ with query, key and scaling

The exception ends the call before attention is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.errors import UnsupportedModelError
from tokencomp.torchlib import compat
from tokencomp.torchlib.replace import AttributeView, shallow_copy

NAME = "tokencomp_capture"
FIX = "Use a reducer without attention, such as 'divprune'."
CHOICE = "prev_topk_indices"  # selection of the indexer of an earlier layer (GLM, Mistral)
SHARED = "shared_kv_states"  # keys and values that later layers reuse (Gemma 4)
# Some rows of a batch (B, R); and the place of every row among these (B, n), or -1. Int64.
RowIndex = tuple[Tensor, Tensor]
# Arguments of a backend that change the logits beyond scale and RoPE.
OTHER_LOGITS = ("softcap", "s_aux", "sinks", "position_bias")


@dataclass
class Captured(Exception):
    """Queries (B, heads, n, d), keys (B, kv heads, N, d), and the factor of their product.

    `attn` is the attention module that computed them.
    """

    query: Tensor
    key: Tensor
    scaling: float
    attn: Any = None


def _capture(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Attention backend that ends the call with its arguments."""
    # Scores are softmax(scaling · q·k): anything else would rank by other attention than the
    # model's.
    other = [name for name in OTHER_LOGITS if kwargs.get(name) is not None]
    if other:
        raise UnsupportedModelError(
            f"{type(module).__name__} changes attention logits by {', '.join(other)}, which "
            f"scores do not include. {FIX}"
        )
    raise Captured(query, key, query.shape[-1] ** -0.5 if scaling is None else float(scaling))


def _some_rows(projection: Callable[[Tensor], Tensor], rows: RowIndex, x: Tensor) -> Tensor:
    """Apply a projection to some rows of its input only; other rows of the output are zero."""
    from tokencomp.kernels import gather_rows

    (some,) = gather_rows([x], rows[0], trusted=True)
    whole: Tensor = gather_rows([projection(some)], rows[1], trusted=True)[0]
    return whole


class Past:
    """A cache with the rows of one layer; updates are not stored."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def get_seq_length(self, *args: Any) -> int:
        return self.keys.shape[-2]

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stored rows followed by the new ones."""
        return torch.cat([self.keys, key], dim=-2), torch.cat([self.values, value], dim=-2)


def unwrapped(module: Any) -> Any:
    """The module inside wrappers of activation checkpointing and torch.compile."""
    names = ("_checkpoint_wrapped_module", "_orig_mod")
    # Wrappers can be nested: torch.compile around a checkpointed layer.
    while inner := [module._modules[name] for name in names if name in module._modules]:
        module = inner[0]
    return module


def attention_of(root: nn.Module) -> Any:
    """The attention module of a decoder layer, which must have one; an attention module itself."""
    return _named_attention(unwrapped(root))[1]


def _named_attention(layer: Any) -> tuple[str, Any]:
    """Name of the attention module in a decoder layer, and the module; "" if `layer` is one."""
    if hasattr(layer, "scaling"):
        return "", layer
    for name, child in layer.named_children():
        module = unwrapped(child)
        named = any(part in name for part in ("attn", "attention", "mixer"))
        if not named or not hasattr(module, "scaling"):
            continue
        if hasattr(module, "rel_extent"):
            raise UnsupportedModelError(
                f"{type(module).__name__} adds a bias by distance to its attention logits, which "
                f"scores do not include. {FIX}"
            )
        return name, module
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no attention module that scores could be read from. {FIX}"
    )


def capture_qk(
    root: Any,
    hidden: Tensor,
    arguments: Mapping[str, Any],
    skipped: Iterable[str] = (),
    rows: RowIndex | None = None,
) -> Captured:
    """Queries and keys that an attention module computes for `hidden` (B, n, d).

    `root` is the module, or the decoder layer around it; it is called with `hidden` and further
    `arguments`, for these n columns. Results of the projections named in `skipped` are not needed.
    `rows`: rows whose queries are returned; None: all. A module that does not call the backend that
    its config names, or changes logits in other ways, is refused.
    """
    from tokencomp.kernels import gather_rows

    # Run a copy of the module with our backend, or a copy of the layer that contains this copy.
    compat.register_attention(NAME, _capture)
    outer = unwrapped(root)
    name, attn = _named_attention(outer)
    # Shallow: weights are shared, and neither the module nor its config changes for other threads.
    run = clone = shallow_copy(attn)
    clone.config = AttributeView(attn.config, _attn_implementation=NAME)
    if name:
        run = shallow_copy(outer)
        run._modules[name] = clone
    stand_ins = _stand_ins(attn, skipped, rows)
    # Arguments that its forward takes.
    call = {"attention_mask": None, **arguments}
    parameters = inspect.signature(type(run).forward).parameters
    if getattr(attn, "indexer", None) is not None:  # reads a mask before the backend is called
        stand_ins["indexer"] = lambda *_, **__: None  # it changes neither queries nor keys
        call["attention_mask"] = hidden.new_ones(1, 1, 1, 1, dtype=torch.bool)
    if CHOICE in parameters and call.get(CHOICE) is None:
        call[CHOICE] = hidden.new_zeros(1, 1, 1, dtype=torch.int32)
    if SHARED in parameters:  # a copy: the layer may write to it for later layers
        call[SHARED] = dict(arguments.get(SHARED) or {})
    # Modules without **kwargs raise for arguments that only other layers take.
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        call = {name: value for name, value in call.items() if name in parameters}
    # Functions become attributes: torch's FLOP counter expects only modules in `_modules`.
    for name, function in stand_ins.items():
        clone._modules.pop(name, None)
        clone.__dict__[name] = function
    try:
        type(run).forward(run, hidden_states=hidden, **call)
    except Captured as captured:
        captured.attn = attn
        # q_proj ran for some rows; norms and RoPE ran for all. Keep the voting ones.
        if rows is not None:
            (captured.query,) = gather_rows([captured.query], rows[0], 2, 0, trusted=True)
        return captured.with_traceback(None)  # frames would keep all tensors of the call
    raise UnsupportedModelError(
        f"{type(attn).__name__} does not call the attention backend that its config names, so its "
        f"queries and keys are unknown. {FIX}"
    )


def _stand_ins(
    attn: Any, skipped: Iterable[str], rows: RowIndex | None
) -> dict[str, Callable[..., Any]]:
    """What replaces projections of `attn`, by name; arguments as in `capture_qk`."""
    found: dict[str, Callable[..., Any]] = {}
    if tensor_parallel_group(attn) is None:  # otherwise projections are narrower on each rank
        for name in skipped:
            width = getattr(getattr(attn, name, None), "out_features", None)
            if isinstance(width, int):
                found[name] = lambda x, width=width: x.new_zeros(*x.shape[:-1], width)
    if rows is not None and isinstance(getattr(attn, "q_proj", None), nn.Module):
        found["q_proj"] = partial(_some_rows, attn.q_proj, rows)
    return found


# -- heads that tensor parallelism distributes over ranks -----------------------------------------


def gather_heads(attn: Any, x: Tensor, dim: int) -> Tensor:
    """Concatenate `x` over ranks along the head axis `dim`; unchanged if this rank has all heads.

    Under tensor parallelism every rank computes some of the heads, in order. All ranks must keep
    the same tokens, so scores need all heads. Values are gathered rather than summed, so that the
    mean over heads rounds as in a single process.
    """
    config = compat.layer_config(getattr(attn, "config", None), getattr(attn, "layer_idx", 0))
    fields = (config, "num_attention_heads"), (config, "num_heads"), (attn, "num_heads")
    counts = (getattr(source, name, None) for source, name in fields)
    total, heads = next((n for n in counts if isinstance(n, int)), None), x.shape[dim]
    if total is None:
        raise UnsupportedModelError(
            f"{type(attn).__name__} does not say how many heads it has "
            f"(config.num_attention_heads), so its attention cannot be scored. {FIX}"
        )
    # One process, or tensor parallelism that copies the heads.
    if heads == total:
        return x
    group = tensor_parallel_group(attn)
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    if heads * ranks != total:
        raise UnsupportedModelError(
            f"{type(attn).__name__} computes {heads} of its {total} heads on this rank, and "
            f"{ranks} ranks are known to share them, so attention cannot be scored. Load the model "
            "with tp_plan and a number of ranks that divides the heads, or use 'divprune'."
        )
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def tensor_parallel_group(attn: Any) -> Any:
    """The process group that shares the heads of a self-attention module, or None.

    Found by the DTensor weight of the query projection (transformers 5.16 and newer) or by the
    device mesh that its module stores (older releases).
    """
    projections = (getattr(attn, name, None) for name in ("q_proj", "qkv_proj", "qkv"))
    # LoRA wraps the linear layer.
    for module in (m for outer in projections if outer is not None for m in outer.modules()):
        weight = getattr(module, "weight", None)
        # DTensors know their mesh; older releases store it on the module.
        mesh = getattr(weight, "device_mesh", None) or getattr(module, "_hf_device_mesh", None)
        if mesh is None:
            continue
        if mesh.ndim == 1:
            return mesh.get_group()
        if "tp" in (mesh.mesh_dim_names or ()):
            return mesh.get_group("tp")
    return None
