"""Prompts that tests share: ragged, padded on the right, and packed into one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.families import Family, text

COLUMNS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def rows(family: Family) -> list[list[Any]]:
    """One image, a video and an image, and text alone."""
    torch.manual_seed(7)
    return [
        [text(3), family.image(0), text(9, 3)],
        [family.video(4), text(3, 4), family.image(1), text(5, 5)],
        [text(11, 6)],
    ]


def ragged(family: Family) -> dict[str, Tensor]:
    """A left-padded batch of `rows`."""
    return family.batch(rows(family))


def prompt(family: Family) -> dict[str, Tensor]:
    """A left-padded batch of an image and of a video."""
    torch.manual_seed(5)
    second = [text(2, 4), family.video(4), text(4, 5)]
    return family.batch([[text(3), family.image(0), text(6, 3)], second])


def single(family: Family, number: int = 0) -> dict[str, Tensor]:
    """One prompt without padding; its image and length depend on `number`."""
    torch.manual_seed(7 + number)
    return family.batch([[text(3 + number), family.image(number % 2), text(9, 3)]])


def one_of_text(family: Family) -> dict[str, Tensor]:
    """A left-padded batch of an image with text, and of text alone."""
    return family.batch([[text(3), family.image(), text(5, 2)], [text(9)]])


def right_padded(
    family: Family, model: nn.Module, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """The batch with its padding on the right, and for every column the one it came from."""
    order = inputs["attention_mask"].sort(dim=1, descending=True, stable=True).indices
    moved = {name: value.gather(1, order) for name, value in inputs.items() if name in COLUMNS}
    given = family.positions(model, inputs)
    moved["position_ids"] = given.gather(-1, order.expand(given.shape))
    return {**inputs, **moved}, order


def packed_rows(family: Family) -> list[list[Any]]:
    """Two prompts with an image, one of which begins with it, and one of text alone."""
    return [
        [text(3), family.image(0), text(9, 3)],
        [family.image(1), text(4, 5)],
        [text(4, 9)],
    ]


def pack(family: Family, model: nn.Module, rows: list[list[Any]]) -> dict[str, Tensor]:
    """One row of all prompts: positions start again in every prompt, and there is no mask."""
    packed = family.batch([[item for row in rows for item in row]])
    del packed["attention_mask"]
    positions = [family.positions(model, family.batch([row])) for row in rows]
    if family.mrope:
        # The first of four rows counts tokens; transformers finds the prompts by it.
        counts = [torch.arange(p.shape[-1]).expand(1, 1, -1) for p in positions]
        positions = [torch.cat([c, p]) for c, p in zip(counts, positions, strict=True)]
    return {**packed, "position_ids": torch.cat(positions, -1)}


def hooks_of(model: nn.Module) -> list[tuple[int, int, int]]:
    """What a patch may leave behind: hooks and attributes of every module."""
    return [
        (len(m._forward_pre_hooks), len(m._forward_hooks), len(m.__dict__)) for m in model.modules()
    ]
