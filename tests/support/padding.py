"""Batches with their padding on the right, as collators for training make them."""

from __future__ import annotations

from torch import Tensor, nn

from support.families import Family

COLUMNS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def shifted(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The batch with its padding on the right, and for every column the one it came from."""
    mask = inputs["attention_mask"]
    order = mask.sort(dim=1, descending=True, stable=True).indices
    moved = {name: value.gather(1, order) for name, value in inputs.items() if name in COLUMNS}
    return {**inputs, **moved}, order


def positions(family: Family, model: nn.Module, inputs: dict[str, Tensor], order: Tensor) -> Tensor:
    """Positions of the shifted columns of a batch whose padding stood on the left."""
    given = family.positions(model, inputs)
    return given.gather(-1, order.expand(given.shape))
