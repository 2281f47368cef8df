"""Ways in which a patched model can be called: what each of them returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import oracle
from support.caches import static_cache
from support.families import Family, text
from support.prompts import pack, packed_rows, ragged, right_padded

STEPS = 4


def generated(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
    return oracle.generate(model, inputs, STEPS, **kwargs)


def greedy(model: nn.Module, family: Family) -> list[Tensor]:
    """Logits of a ragged batch: its prefill, and tokens that are decoded behind it."""
    return list(generated(model, ragged(family)).logits)


def beams(model: nn.Module, family: Family) -> list[Tensor]:
    """What beam search finds, and the logits of its beams."""
    out = generated(model, ragged(family), num_beams=3, num_return_sequences=2)
    return [out.sequences.float(), *out.logits]


def chunks(model: nn.Module, family: Family) -> list[Tensor]:
    """Logits behind a prefill in chunks."""
    if not hasattr(model, "_expand_multimodal_outputs"):
        pytest.skip("this transformers cannot chunk prompts with media, patched or not")
    return list(generated(model, ragged(family), prefill_chunk_size=7).logits)


def static(model: nn.Module, family: Family) -> list[Tensor]:
    """Logits on static caches: of a ragged batch, of one prompt, and of turns."""
    batch, found = ragged(family), []
    one = family.batch([[text(3), family.image(0), text(9, 3)]])
    for inputs in (batch, one):
        found += generated(model, inputs, cache_implementation="static").logits
    return [*found, *turns(model, family, static_cache(model, 256))]


def turns(model: nn.Module, family: Family, held: Any = None) -> list[Tensor]:
    """Logits of a second turn that brings an image, and of a third of text alone.

    `held` is a cache to write to; by default the model makes one.
    """
    torch.manual_seed(7)
    rows = [[text(3), family.image(0), text(5, 3)], [text(2, 9), family.image(0), text(4, 8)]]
    parts = [family.batch([row]) for row in (*rows, [text(6, 4)])]
    whole = family.batch([[*rows[0], *rows[1], text(6, 4)]])
    where, start, found = family.positions(model, whole), 0, []
    cache: dict[str, Any] = {"use_cache": True}
    if held is not None:
        cache["past_key_values"] = held
    for part in parts:
        stop = start + part["input_ids"].shape[1]
        mask, own = whole["attention_mask"][:, :stop], where[..., start:stop]
        with torch.no_grad():
            out = model(**{**part, "attention_mask": mask, "position_ids": own}, **cache)
        if held is None:
            cache[oracle.cache_name(out)] = oracle.cache_of(out)
        found.append(out.logits[:, -1])
        start = stop
    return found


def training(model: nn.Module, family: Family) -> list[Tensor]:
    """Loss and gradients of a batch with its padding on the right."""
    left = ragged(family)
    right, order = right_padded(family, model, left)
    labels = torch.full_like(left["input_ids"], -100)
    labels[:, -4:] = left["input_ids"][:, -4:]
    loss = model(**right, labels=labels.gather(1, order)).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def packed(model: nn.Module, family: Family) -> list[Tensor]:
    """Logits of several prompts in one row."""
    torch.manual_seed(7)
    with torch.no_grad():
        return [model(**pack(family, model, packed_rows(family)), use_cache=False).logits]


WAYS = {way.__name__: way for way in (greedy, beams, chunks, turns, static, training, packed)}
