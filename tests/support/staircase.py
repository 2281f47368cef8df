"""The oracle of eviction: one run of full length under a mask with a step at every eviction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support import oracle
from support.families import Family
from tokencomp.session.evict import held_columns

NEVER, DROPPED = 1 << 40, -1


class Log:
    """From which token on every column is hidden, in every layer of a cache."""

    def __init__(self) -> None:
        self.ends: list[Tensor] = []

    def _note(self, cache: Any, tokens: int, end: int) -> None:
        layers = [layer for layer in cache.layers if layer.is_initialized]
        self.ends = self.ends or [torch.zeros(0, dtype=torch.long) for _ in layers]
        for i, layer in enumerate(layers):
            new = torch.full((tokens - len(self.ends[i]),), NEVER)
            ends = torch.cat([self.ends[i], new])
            gone = torch.ones(tokens, dtype=torch.bool)
            gone[held_columns(layer)[0]] = False
            self.ends[i] = torch.where(gone & (ends == NEVER), end, ends)

    def added(self, cache: Any, tokens: int) -> None:
        """A part was added. What is missing now was dropped before any token could see it."""
        self._note(cache, tokens, DROPPED)

    def evicted(self, cache: Any, tokens: int) -> None:
        """An eviction. What is missing in addition is hidden from the next token on."""
        self._note(cache, tokens, tokens)

    def mask(self, layer: int, n: int) -> Tensor:
        """Which column every token sees, bool (n, n)."""
        ends, rows = torch.full((n,), NEVER), torch.arange(n)
        ends[: len(self.ends[layer])] = self.ends[layer]
        seen = (rows[:, None] >= rows) & (rows[:, None] < ends)
        return seen | torch.eye(n, dtype=torch.bool)  # no row without any key

    def without_evictions(self) -> Log:
        """The same, where only what reducers have dropped is hidden."""
        plain = Log()
        plain.ends = [torch.where(ends == DROPPED, ends, NEVER) for ends in self.ends]
        return plain


def logits(
    model: nn.Module, family: Family, inputs: dict[str, Tensor], log: Log, merged: Any = None
) -> Tensor:
    """Logits (1, V) behind the last token of an unpatched run under the staircase.

    `merged` (`oracle.Merged`) merges hidden columns into others first, in float64.
    """
    masks = [log.mask(i, inputs["input_ids"].shape[1])[None] for i in range(family.layers)]
    inputs = {**inputs, "position_ids": family.positions(model, inputs)}
    return oracle.run_masked(model, family, inputs, masks, merged)[:, -1]
