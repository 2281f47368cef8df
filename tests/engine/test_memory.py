"""What a cache shows of pictures, against a table with one entry per place."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokencomp.engine.memory import Entered, Memory
from tokencomp.tokens.signals import FRAMES, SEEN

SIZES = {"image": (2, 3), "video": (1, 4)}
KEYS = [(signal, modality, *SIZES[modality]) for signal in (SEEN, FRAMES) for modality in SIZES]
Place = tuple[int, tuple[Any, ...], int]  # sample, key, number of the place


class Table:
    """The value and the row that shows it, of every place."""

    def __init__(self, batch: int) -> None:
        self.batch, self.rows = batch, 0
        self.shown: dict[Place, tuple[float, int]] = {}

    def add(self, chance: random.Random) -> tuple[list[Entered], Tensor]:
        """A prompt with pictures in some samples, of which some tokens are held."""
        entered, tables, held, longest = [], [], [], 0
        for b in range(self.batch):
            columns = 1
            kept = []
            for key in KEYS:
                if chance.random() < 0.5:
                    frames = chance.randrange(1, 4) if key[0] is SEEN else 1
                    places = key[2] * key[3]
                    numbers = columns + np.arange(frames * places).reshape(frames, places)
                    values = torch.randn(frames * places, 1)
                    span = None if key[0] is SEEN else (columns, columns + frames * places)
                    given: Any = values if span else lambda i, v=values: v[i]
                    entered.append(Entered(b, key, numbers, given, span))
                    tables.append((b, key, numbers, values))
                    columns += frames * places + 1
            kept = [c for c in range(columns) if chance.random() < 0.6]
            held.append({c: i for i, c in enumerate(kept)})
            longest = max(longest, columns)
        width = max(map(len, held))
        row = torch.full((self.batch, longest), -1)
        for b, own in enumerate(held):  # aligned to the right, behind the rows of the cache
            for column, i in own.items():
                row[b, column] = self.rows + width - len(own) + i
        for b, key, numbers, values in tables:
            self._show(b, key, row[b][torch.from_numpy(numbers)], values)
        self.rows += width
        return entered, row

    def _show(self, b: int, key: tuple[Any, ...], rows: Tensor, values: Tensor) -> None:
        places = rows.shape[1]
        if key[0] is FRAMES:
            for place in range(places):
                self.shown.pop((b, key, place), None)
        for i, row in enumerate(rows.flatten().tolist()):
            if row < 0 and key[0] is FRAMES:
                row = int(rows.max())
            if row >= 0:
                self.shown[b, key, i % places] = float(values[i]), row

    def keep(self, rows: list[int]) -> None:
        number = {row: i for i, row in enumerate(rows)}
        self.shown = {k: (v, number[r]) for k, (v, r) in self.shown.items() if r in number}
        self.rows = len(rows)

    def select(self, samples: list[int]) -> None:
        old, self.batch = self.shown, len(samples)
        self.shown = {
            (new, *k[1:]): v for new, b in enumerate(samples) for k, v in old.items() if k[0] == b
        }

    def forget(self, modality: str, but: set[Any]) -> None:
        self.shown = {k: v for k, v in self.shown.items() if k[1][1] != modality or k[1][:2] in but}


def entries(memory: Memory, batch: int) -> dict[Place, tuple[float, int]]:
    found: dict[Place, tuple[float, int]] = {}
    for b, sample in enumerate(memory.of(batch)):
        for key, shown in sample.items():
            pairs = zip(shown.known()[:, 0].tolist(), shown.rows.tolist(), strict=True)
            assert all((value != value) == (row < 0) for value, row in pairs)
            for place, row in enumerate(shown.rows.tolist()):
                if row >= 0:
                    found[b, key, place] = float(shown.known()[place]), row
    return found


@pytest.mark.parametrize("seed", range(8))
def test_it_changes_as_the_rows_do(seed: int) -> None:
    chance = random.Random(seed)
    memory, table = Memory(), Table(2)
    for _ in range(30):
        change = chance.choice(["append", "append", "crop", "evict", "select", "forget"])
        if change == "append":
            before = memory
            entered, rows = table.add(chance)
            memory = memory.append(entered, rows, table.rows)
            if table.batch == 1:
                keys = {e.key for e in entered}
                new = {row for (_, key, _), (_, row) in table.shown.items() if key in keys}
                assert {*memory.since(before).tolist()} == new
        elif change in ("crop", "evict") and table.rows:
            left = sorted(chance.sample(range(table.rows), chance.randrange(table.rows)))
            left = left if change == "evict" else [*range(len(left))]
            memory = memory.cut(torch.tensor(left, dtype=torch.int64))
            table.keep(left)
        elif change == "select":
            samples = [chance.randrange(table.batch) for _ in range(chance.randrange(1, 4))]
            memory = memory.select(lambda t, s=samples: t[torch.tensor(s)])
            table.select(samples)
        elif change == "forget":
            modality = chance.choice([*SIZES])
            but = {(chance.choice([SEEN, FRAMES]), modality)} if chance.random() < 0.5 else set()
            memory = memory.forget({modality}, but)  # type: ignore[arg-type]
            table.forget(modality, but)
        assert entries(memory, table.batch) == table.shown
        assert all(row < memory.end for _, row in table.shown.values())


def test_a_batch_of_another_size_has_seen_nothing() -> None:
    memory, table = Memory(), Table(2)
    while not table.shown:
        entered, rows = table.add(random.Random(1))
        memory = memory.append(entered, rows, table.rows)
    assert memory.of(2) != [{}, {}]
    assert memory.of(1) == [{}] and memory.of(4) == [{}] * 4
