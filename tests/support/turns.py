"""Conversations of two turns, of which the second runs on the cache of the first."""

from __future__ import annotations

import torch
from torch import nn

import tokencomp
from support import oracle
from support.families import Family, text
from tokencomp import Plan


def image_in_second_turn(family: Family, model: nn.Module, plan: Plan) -> float:
    """How far logits behind a second image on a reused cache are from those of one prompt.

    Both turns have an image and are compressed; the last column of the second is compared.
    """
    a, b = family.image(0), family.image(1)
    first, second = [text(3), a, text(5, 3)], [text(2, 9), b, text(4, 8)]
    both = family.batch([[*first, *second]])
    positions = family.positions(model, both)
    n = family.batch([first])["input_ids"].shape[1]
    with tokencomp.patch(model, plan=plan), torch.no_grad():
        out = model(**family.batch([first]), position_ids=positions[..., :n], use_cache=True)
        turn = {**family.batch([second]), "attention_mask": both["attention_mask"]}
        turn |= {"position_ids": positions[..., n:], "past_key_values": oracle.cache_of(out)}
        last = model(**turn, use_cache=True, logits_to_keep=1).logits[:, -1]
        expected = model(**both, position_ids=positions, logits_to_keep=1).logits[:, -1]
    return float((last - expected).abs().max())
