"""The oracle of the tower stage: a full-length tower whose attention ignores dropped patches.

Which patches a patched run has seen is read off the input of the block at the stage, row by row;
nothing here knows cells, grids or orders.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokencomp
from support import oracle
from support.families import Family
from tokencomp.adapters.registry import adapter_for
from tokencomp.adapters.towers.base import attention_blocks

LOUD = 6
TOLERANCE = {"sdpa": 1e-6, "eager": 1e-4}  # float64 and float32, see `build`


def tower_of(model: nn.Module) -> nn.Module:
    """The vision tower."""
    adapter = adapter_for(model)
    return getattr(adapter.body, "visual", None) or adapter.tower


def deep(family: Family, blocks: int = 3) -> Family:
    """The family with a vision tower of that many blocks."""
    result, config = copy.copy(family), family.config

    def deeper() -> Any:
        deep_config = config()
        vision = deep_config.vision_config
        name = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
        setattr(vision, name, blocks)
        return deep_config

    result.config = deeper  # type: ignore[method-assign]
    return result


def build(family: Family, backend: str = "sdpa") -> nn.Module:
    """A model whose tower has loud weights: with the usual ones, drops hardly show.

    In float64, except for eager attention: transformers takes its softmax in float32, in which the
    lowest float64 of a mask is -inf, so that padding becomes NaN.
    """
    model = family.build(backend)
    model = model if backend == "eager" else model.double()
    with torch.no_grad():
        for name, p in tower_of(model).named_parameters():
            if p.ndim == 2 and "position" not in name and "pos_embed" not in name:
                p.mul_(LOUD)
    return model


def like(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with pixels in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def tower_blocks(model: nn.Module) -> list[nn.Module]:
    """Modules that hold one self-attention each, in order."""
    names = {m: n for n, m in model.named_modules()}
    blocks = attention_blocks(tower_of(model))
    return [model.get_submodule(names[a].rpartition(".")[0]) for a in blocks]


@contextlib.contextmanager
def block_inputs(model: nn.Module, k: int) -> Iterator[list[Tensor]]:
    """Collects the hidden states that reach block `k`, per call of the tower."""
    seen: list[Tensor] = []

    def spy(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    with tower_blocks(model)[k].register_forward_pre_hook(spy, with_kwargs=True):
        yield seen


def seen_rows(full: list[Tensor], short: list[Tensor]) -> list[Tensor]:
    """Per call, which rows of the full input are among the short one, (pictures, rows) or (rows,).

    Random pixels make all rows different, so equal rows are the same row.
    """
    masks = []
    for whole, part in zip(full, short, strict=True):
        whole3, part3 = (x if x.ndim == 3 else x[None] for x in (whole, part))
        exact = "donot_use_mm_for_euclid_dist"
        mask = torch.cdist(whole3, part3, compute_mode=exact).amin(-1) < 1e-9
        assert int(mask.sum()) == part3.shape[0] * part3.shape[1]
        masks.append(mask if whole.ndim == 3 else mask[0])
    return masks


@contextlib.contextmanager
def tower_masks(model: nn.Module, masks: list[Tensor], k: int) -> Iterator[None]:
    """Let the attention of blocks `k` and later ignore the rows that are False, call by call."""
    calls, tower = [0], tower_of(model)

    def count(module: Any, args: Any, out: Any) -> None:
        calls[0] += 1

    def dense(attn: Any, args: Any, kwargs: Any) -> Any:
        mask = masks[calls[0]]
        x = args[0] if args else kwargs["hidden_states"]
        mask = nn.functional.pad(mask, (x.shape[1] - mask.shape[1], 0), value=True)  # class token
        floor = torch.finfo(x.dtype).min
        hidden = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, floor)[:, None, None]
        old = kwargs.get("attention_mask")
        hidden = hidden if old is None else hidden + old.to(hidden)
        rest = {n: v for n, v in kwargs.items() if n != "attention_mask"}
        return args, {**rest, "attention_mask": hidden}

    def order_of(bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Kept rows first in every sequence, as a sequence of their own."""
        mask, order, lengths = masks[calls[0]], [], []
        for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
            rows = torch.arange(a, b)
            for part in (rows[mask[a:b]], rows[~mask[a:b]]):
                order += [part] if len(part) else []
                lengths += [len(part)] if len(part) else []
        return torch.cat(order), torch.tensor([0, *lengths]).cumsum(0).to(bounds.dtype)

    def packed(attn: Any, args: Any, kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        x = args[0] if args else kwargs.pop("hidden_states")
        order, kwargs["cu_seqlens"] = order_of(kwargs["cu_seqlens"])
        attn.oracle_order, kwargs["max_seqlen"] = order, None
        tables = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = tuple(t[order] for t in tables)
        return (x[order],), kwargs

    def unsorted(attn: Any, args: Any, out: Any) -> Any:
        return out[attn.oracle_order.argsort()]

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(tower.register_forward_hook(count))
        for attn in attention_blocks(tower)[k:]:
            before = packed if hasattr(attn, "qkv") else dense
            hooks.enter_context(attn.register_forward_pre_hook(before, with_kwargs=True))
            if before is packed:
                hooks.enter_context(attn.register_forward_hook(unsorted))
        yield


def rows_after(model: nn.Module, inputs: dict[str, Tensor], plan: Any, **call: Any) -> Any:
    """Which rows the tower of a patched run sees from the block of the stage on, per call."""
    k = plan.tower.block
    with block_inputs(model, k) as full, torch.no_grad():
        model(**inputs, use_cache=False)
    with tokencomp.patch(model, plan=plan), block_inputs(model, k) as short, torch.no_grad():
        model(**inputs, use_cache=False)
    return seen_rows(full, short)


def check_drop_equals_mask(
    family: Family,
    model: nn.Module,
    inputs: dict[str, Tensor],
    plan: Any,
    backend: str = "sdpa",
    seen: Any = None,
) -> Any:
    """Prefill and every decode step, after stages of the decoder; gives the stats of the prompt.

    `seen`: which patches the tower sees, if they are known, see `seen_rows`.
    """
    block = plan.tower.block
    seen = seen or rows_after(model, inputs, plan)
    assert all(not mask.all() for mask in seen)
    with tokencomp.patch(model, plan=plan) as handle:
        out = oracle.generate(model, inputs, 4)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        stats = handle.stats
    assert stats.tower_ratio == pytest.approx(1 - _left(model, seen, block), abs=0.05)
    length = inputs["input_ids"].shape[1]
    new = out.sequences[:, length:][:, :-1]
    with tower_masks(model, seen, block):
        expected = oracle.masked_logits(model, family, inputs, masks, new)
    unmasked = oracle.masked_logits(model, family, inputs, masks, new)
    for step, logits in enumerate(out.logits):
        column = length - 1 + step
        assert (logits - expected[:, column]).abs().max() < TOLERANCE[backend], f"step {step}"
        assert (expected[:2, column] - unmasked[:2, column]).abs().amax(-1).min() > 1e-3
    return stats


def _left(model: Any, seen: list[Tensor], block: int) -> float:
    """Mean over the blocks in use of the share of rows that they see, of three blocks in all.

    Pictures of a batch are padded to the longest.
    """
    layer = getattr(model.config, "vision_feature_layer", getattr(model.config, "select_layer", -1))
    used = 3 + layer + 1
    rows = [len(m) * int(m.sum(1).max()) if m.ndim == 2 else int(m.sum()) for m in seen]
    share = sum(rows) / sum(m.numel() for m in seen)
    return (block + (used - block) * share) / used
