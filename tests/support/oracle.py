"""The oracle of the suite: the full-length, unpatched run in which dropped columns are hidden.

`tokencomp.conformance.oracle` hides them, in the masks that transformers makes; this file adds
merging, which changes hidden states and attention logits of the same run, and generation.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokencomp
from support.families import IMAGE, PAD, Family, text
from tokencomp.conformance.oracle import columns_left, hidden


def kept_columns(handle: Any, inputs: dict[str, Tensor], num_layers: int) -> list[Tensor]:
    """Per layer: mask (B, L) of the columns that are real and not dropped, from `handle.stats`."""
    return columns_left(handle.stats, handle.plan, inputs["attention_mask"].bool(), num_layers)


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
    becomes the mean weighted by sizes. Attention logits gain the logarithm of the size.
    """

    def __init__(self, handle: Any) -> None:
        stats, stages = handle.stats, handle.plan.stages
        rows = range(len(stats.spans))
        self.spans, self.kept = stats.spans, [stats.kept(b) for b in rows]
        self.stages = {s.layer: i for i, s in enumerate(stages)}
        self.merging = {s.layer for s in stages if s.merge}
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
                    if layer in self.merging:
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


class MergedTurns:
    """`Merged` of several turns of one conversation."""

    def __init__(self) -> None:
        self.parts: list[Merged] = []

    def add(self, handle: Any, start: int) -> None:
        """The turn that `handle` has counted last, whose first column is `start`."""
        part = Merged(handle)
        part.spans = [
            [dataclasses.replace(span, start=span.start + start) for span in row]
            for row in part.spans
        ]
        self.parts.append(part)

    @property
    def sizes(self) -> Tensor:
        return torch.stack([part.sizes for part in self.parts]).prod(0)

    @sizes.setter
    def sizes(self, ones: Tensor) -> None:
        for part in self.parts:
            part.sizes = ones.clone()

    def __call__(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        for part in self.parts:
            x, _ = part(layer, x)
        return x, self.sizes.log()


@contextlib.contextmanager
def masked(
    model: nn.Module, family: Family, masks: list[Tensor], merged: Merged | None = None
) -> Iterator[None]:
    """Hide columns from every decoder layer: `masks` has a bool (B, L) for each.

    `merged` merges them into others first. Attention of the decoder is eager inside the block.
    """
    decoder: Any = family.decoder(model)
    config, backend = decoder.config, decoder.config._attn_implementation
    config._attn_implementation = "eager"
    try:
        with contextlib.ExitStack() as hooks:
            if merged is not None:
                before = partial(decoder.register_forward_pre_hook, with_kwargs=True)
                hooks.enter_context(before(partial(_merge_entry, merged)))
                for i, layer in enumerate(decoder.layers):
                    before = partial(layer.register_forward_pre_hook, with_kwargs=True)
                    hooks.enter_context(before(partial(_merge_layer, merged, i)))
            hooks.enter_context(hidden(decoder.layers, masks))
            yield
    finally:
        config._attn_implementation = backend


def _merge_entry(merged: Merged, decoder: nn.Module, args: Any, kwargs: Any) -> Any:
    """At entry; a decoder may make more of its input than the states before layer 0."""
    return args, {**kwargs, "inputs_embeds": merged(0, kwargs["inputs_embeds"])[0]}


def _merge_layer(merged: Merged, i: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Merge the hidden states before layer `i`, and add the logarithms of sizes to its mask."""
    x = args[0] if args else kwargs.pop("hidden_states")
    x, bias = merged(i, x) if i else (x, merged.sizes.log())
    mask = kwargs["attention_mask"].clamp(min=torch.finfo(torch.float32).min)
    return (x, *args[1:]), {**kwargs, "attention_mask": mask + bias[:, None, None]}


def following(positions: Tensor, count: int) -> Tensor:
    """Positions of the `count` tokens that follow a prompt with `positions`."""
    last = positions.amax(-1, keepdim=True)
    if last.ndim == 3:  # the largest of all axes
        last = last.amax(0, keepdim=True).expand(len(positions), -1, -1)
    return last + torch.arange(1, count + 1)


def continued(inputs: dict[str, Tensor], positions: Tensor, new: Tensor) -> dict[str, Tensor]:
    """Arguments of the full-length run over a prompt and the tokens (B, T) that follow it."""
    inputs, ones = dict(inputs), torch.ones_like(new)
    inputs["position_ids"] = torch.cat([positions, following(positions, new.shape[1])], -1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            types = inputs[name]
            inputs[name] = torch.cat([types, torch.zeros_like(new).to(types)], 1)
    return inputs


def later_turn(inputs: dict[str, Tensor], positions: Tensor, new: Tensor, out: Any) -> dict:
    """Arguments of a turn of text (B, T) on the cache that a prompt has left in `out`."""
    whole, width = continued(inputs, positions, new), positions.shape[-1]
    turn = {"input_ids": new, "attention_mask": whole["attention_mask"]}
    if "token_type_ids" in inputs:
        turn["token_type_ids"] = torch.zeros_like(new)
    turn |= {"position_ids": whole["position_ids"][..., width:], cache_name(out): cache_of(out)}
    return turn


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
    new = inputs["input_ids"][:, :0] if new is None else new
    full = continued(inputs, family.positions(model, inputs), new)
    masks = [torch.cat([mask, torch.ones_like(new).bool()], 1) for mask in masks]
    return run_masked(model, family, full, masks, merged)


@torch.no_grad()
def run_masked(
    model: nn.Module,
    family: Family,
    inputs: dict[str, Tensor],
    masks: list[Tensor],
    merged: Merged | None = None,
) -> Tensor:
    """Logits of the masked run over `inputs`, in float64 with `merged`."""
    if merged is not None:
        model = copy.deepcopy(model).double()
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        merged.sizes = torch.ones(inputs["input_ids"].shape, dtype=torch.float64)
    with masked(model, family, masks, merged):
        return model(**inputs, use_cache=False).logits


def generate(model: nn.Module, inputs: dict[str, Tensor], steps: int = 8, **kwargs: Any) -> Any:
    """Greedy generation with logits, at least `steps` tokens, none of them a placeholder."""
    media = [*range(IMAGE, IMAGE + 6)]
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, "pad_token_id": PAD, "suppress_tokens": media, **kwargs},
    )


def generated(
    model: nn.Module,
    family: Family,
    inputs: dict[str, Tensor],
    steps: int = 8,
    call: dict[str, Any] | None = None,
    **setting: Any,
) -> tuple[Any, Any, list[Tensor]]:
    """Generate under a patch: its handle, what `generate` gives, and the kept columns by layer."""
    with tokencomp.patch(model, **setting) as handle:
        out = generate(model, inputs, steps, **(call or {}))
        return handle, out, kept_columns(handle, inputs, family.layers)


def deviation(
    model: nn.Module,
    family: Family,
    inputs: dict[str, Tensor],
    out: Any,
    masks: list[Tensor],
    merged: Merged | None = None,
) -> float:
    """How far the logits of a prefill and of all decode steps are from those of the oracle."""
    width = inputs["input_ids"].shape[1]
    new = out.sequences[:, width:-1]
    expected = masked_logits(model, family, inputs, masks, new, merged)[:, width - 1 :]
    return difference(torch.stack(out.logits, 1), expected)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    """Whether two generations have the same tokens and nearly the same logits."""
    same = torch.equal(a.sequences, b.sequences)
    return same and difference(torch.stack(a.logits), torch.stack(b.logits)) < tolerance


@torch.no_grad()
def decoder_inputs(model: nn.Module, family: Family, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the body of an unpatched model hands to its decoder."""
    caught: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)

    with family.decoder(model).register_forward_pre_hook(note, with_kwargs=True):
        model(**inputs)
    return caught


def cache_name(output: Any) -> str:
    """The name under which the installed release takes and returns a cache."""
    return "cache" if output.get("cache") is not None else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache of a generate or forward output, old or new name."""
    return output.get(cache_name(output))


def image_in_second_turn(family: Family, model: nn.Module, **setting: Any) -> float:
    """How far logits after a second image on a reused cache are from those of one prompt.

    Both turns have an image and are compressed; the last column of the second is compared.
    """
    first, second = [text(3), family.image(0), text(5, 3)], [text(2, 9), family.image(1), text(4)]
    both = family.batch([[*first, *second]])
    positions = family.positions(model, both)
    n = family.batch([first])["input_ids"].shape[1]
    with tokencomp.patch(model, **setting), torch.no_grad():
        out = model(**family.batch([first]), position_ids=positions[..., :n], use_cache=True)
        turn = {**family.batch([second]), "attention_mask": both["attention_mask"]}
        turn |= {"position_ids": positions[..., n:], "past_key_values": cache_of(out)}
        last = model(**turn, use_cache=True, logits_to_keep=1).logits[:, -1]
        expected = model(**both, position_ids=positions, logits_to_keep=1).logits[:, -1]
    return difference(last, expected)
