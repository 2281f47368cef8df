"""The oracle of the suite: the full-length, unpatched run whose dropped columns are masked."""

from __future__ import annotations

import contextlib
import copy
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


class Merged:
    """Merges what leaves at the stages of a patch, in full-length hidden states and plain loops.

    A column that leaves is added to the kept patch of its span with the largest cosine, which
    becomes the mean weighted by sizes. Attention logits gain the logarithm of the size. With
    `modalities`, stages merge in spans of these kinds alone.
    """

    def __init__(self, handle: Any, modalities: frozenset[str] | None = None) -> None:
        stats, stages = handle.stats, handle.plan.stages
        rows = range(len(stats.spans))
        self.spans, self.kept = stats.spans, [stats.kept(b) for b in rows]
        self.stages = {s.layer: i for i, s in enumerate(stages)}
        self.merging = {s.layer for s in stages if s.merge is True or modalities}
        self.modalities = modalities
        self.left = [stats.tower_kept(b) for b in rows]
        self.sizes = torch.ones(0)  # of all columns, (B, L)

    def __call__(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, d) before a layer, and what its logits gain, (B, L)."""
        if layer in self.stages:
            x = x.clone()
            for b, row in enumerate(self.spans):
                for j, span in enumerate(row):
                    kept = self.kept[b][self.stages[layer]][j]
                    special = [*span.special, *span.text]
                    if layer in self.merging and (
                        self.modalities is None or span.modality in self.modalities
                    ):
                        self._merge(b, span.start, self.left[b][j], kept, special, x)
                    self.left[b][j] = kept
        return x, self.sizes.log()

    def _merge(
        self, b: int, start: int, left: list[int], kept: list[int], special: list[int], x: Tensor
    ) -> None:
        targets = [start + o for o in kept if o not in special]
        groups = {column: [column] for column in targets}
        before = x[b].clone()
        for column in (start + o for o in left if o not in kept and targets):
            near = torch.cosine_similarity(before[column], before[targets], dim=1)
            groups[targets[int(near.argmax())]].append(column)
        for column, members in groups.items():
            weights = self.sizes[b, members]
            x[b, column] = (weights[:, None] * before[members]).sum(0) / weights.sum()
            self.sizes[b, column] = weights.sum()


@contextlib.contextmanager
def layer_masks(
    model: nn.Module, family: Family, masks: list[Tensor], merged: Merged | None = None
) -> Iterator[None]:
    """Give every decoder layer its own causal mask with hidden columns; `merged` merges these."""
    hooks = []
    for i, (layer, mask) in enumerate(zip(family.decoder(model).layers, masks, strict=True)):

        def hook(module: nn.Module, args: Any, kwargs: Any, i: int = i, mask: Tensor = mask) -> Any:
            n = mask.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None] & mask[:, None, None]
            seen = seen | torch.eye(n, dtype=torch.bool)  # no row without any key
            eager = family.decoder(model).config._attn_implementation == "eager"
            added = torch.zeros(mask.shape)
            if merged is not None:
                x = args[0] if args else kwargs.pop("hidden_states")
                x, added = merged(i, x)
                args = (x, *args[1:])
            if eager or merged is not None:
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
    merged: Merged | None = None,
) -> Tensor:
    """Logits (B, L + T, V) of the masked run over the prompt and T further tokens `new`.

    With `merged` hidden columns are merged into others first, and all is float64.
    """
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
    if merged is not None:
        model = copy.deepcopy(model).double()
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        merged.sizes = torch.ones(inputs["input_ids"].shape, dtype=torch.float64)
    with torch.no_grad(), layer_masks(model, family, masks, merged):
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
