"""The oracle of the suite: the full-length, unpatched run whose dropped columns are masked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from support.families import PAD, Family


def kept_columns(handle: Any, inputs: dict[str, Tensor], num_layers: int) -> list[Tensor]:
    """Per layer: mask (B, L) of columns that are real and still there, from `handle.stats`."""
    stats, stages = handle.stats, {s.layer: i for i, s in enumerate(handle.plan.stages)}
    current, masks = inputs["attention_mask"].bool().clone(), []

    def leave(b: int, kept: list[list[int]]) -> None:
        for span, offsets in zip(stats.spans[b], kept, strict=True):
            current[b, span.start : span.stop] = False
            current[b, [span.start + o for o in offsets]] = True

    for b in range(len(stats.spans)):
        leave(b, stats.tower_kept(b))
    for layer in range(num_layers):
        if layer in stages:
            for b in range(len(stats.spans)):
                leave(b, stats.kept(b)[stages[layer]])
        masks.append(current.clone())
    return masks


def repeated(rows: Tensor, mask: Tensor) -> Tensor:
    """Rows (B, L, d) where a column that is not in mask (B, L) repeats the last before that is."""
    out = torch.zeros_like(rows)
    for b, row in enumerate(mask.tolist()):
        last = None
        for column, left in enumerate(row):
            last = column if left else last
            if last is not None:
                out[b, column] = rows[b, last]
    return out


@contextlib.contextmanager
def layer_masks(
    model: nn.Module, family: Family, masks: list[Tensor], bias: Tensor | None = None
) -> Iterator[None]:
    """Give every decoder layer its own causal mask with hidden columns.

    `bias` (B, L) is added to the attention logits of every column.
    """
    hooks = []
    for layer, mask in zip(family.decoder(model).layers, masks, strict=True):

        def hook(module: nn.Module, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
            n = mask.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None] & mask[:, None, None]
            seen = seen | torch.eye(n, dtype=torch.bool)  # no row without any key
            eager = family.decoder(model).config._attn_implementation == "eager"
            if eager or bias is not None:
                added = torch.zeros(mask.shape) if bias is None else bias
                floor = torch.finfo(torch.float32).min
                dense = torch.where(seen, added[:, None, None], floor)
                return args, {**kwargs, "attention_mask": dense}
            return args, {**kwargs, "attention_mask": seen}

        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def masked_logits(
    model: nn.Module,
    family: Family,
    inputs: dict[str, Tensor],
    masks: list[Tensor],
    new: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Logits (B, L + T, V) of the masked run over the prompt and T further tokens `new`."""
    positions = family.positions(model, inputs)
    inputs = dict(inputs)
    if new is not None:
        steps = torch.arange(1, new.shape[1] + 1)
        last = positions.max(0).values.max(-1).values if positions.ndim == 3 else positions[:, -1]
        more = last[:, None] + steps
        more = more.expand(*positions.shape[:-1], -1) if positions.ndim == 3 else more
        positions = torch.cat([positions, more], -1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        ones = torch.ones_like(new)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(new).to(types)], 1)
        masks = [torch.cat([m, ones.bool()], 1) for m in masks]
        bias = None if bias is None else torch.cat([bias, torch.zeros(new.shape)], 1)
    with torch.no_grad(), layer_masks(model, family, masks, bias):
        return model(**inputs, position_ids=positions, use_cache=False).logits


def generate(model: nn.Module, inputs: dict[str, Tensor], steps: int = 8, **kwargs: Any) -> Any:
    """Greedy generation with logits, at least `steps` tokens."""
    kwargs = {"do_sample": False, "pad_token_id": PAD, **kwargs}
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )


def cache_name(output: Any) -> str:
    """The name under which the installed release takes and returns a cache."""
    return "cache" if output.get("cache") is not None else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache of a generate or forward output, old or new name."""
    for name in ("cache", "past_key_values"):
        if output.get(name) is not None:
            return output[name]
    return None


def repeated_maps(maps: Tensor, mask: Tensor) -> Tensor:
    """Maps (B, H, L, L) where a query row that is not in mask (B, L) repeats the last that is."""
    heads = maps.shape[1]
    rows = repeated(maps.transpose(1, 2).flatten(2), mask)
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)
