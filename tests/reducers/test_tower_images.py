"""Methods for pictures that read the vision tower, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from support import matrix
from support.tower_loops import Rows, best, check, cosine, kept, mean, rows_of

from tokencomp import Tokens, make_reducer
from tokencomp.reducers.hiprune import MIDDLE
from tokencomp.tokens.signals import TOWER_ATTENTION, TOWER_KEYS

GRIDS = [(1, 5, 6), (4, 3, 4), (6, 2, 3)]


@pytest.mark.parametrize(("grid", "keep"), [(GRIDS[0], 1), (GRIDS[1], 20), (GRIDS[2], 9)])
def test_visionzip(grid: tuple[int, int, int], keep: int) -> None:
    given = matrix.tokens(grid)
    x, attention = rows_of(given)
    keys = given.tower[TOWER_KEYS].double().mean(1).tolist()
    contextual = max(1, round(keep * 10 / 64))
    dominant = best(dict(enumerate(attention)), keep - contextual)
    rest = [i for i in range(len(x)) if i not in dominant]
    step = max(1, len(rest) // contextual)
    targets = [rest[i * step] for i in range(contextual)]
    members: dict[int, list[int]] = {target: [target] for target in targets}
    for i in rest:
        if i not in targets:
            members[max(targets, key=lambda j: (cosine(keys[i], keys[j]), -j))].append(i)
    rows: Rows = [(i, x[i], 1.0) for i in dominant]
    rows += [(j, mean([x[i] for i in own]), float(len(own))) for j, own in members.items()]
    check(matrix.kept(make_reducer("visionzip"), given, keep), rows)


@pytest.mark.parametrize(("grid", "keep"), [(GRIDS[0], 16), (GRIDS[1], 1), (GRIDS[2], 8)])
def test_visprune(grid: tuple[int, int, int], keep: int) -> None:
    given = matrix.tokens(grid)
    x, attention = rows_of(given)
    order = sorted(range(len(x)), key=lambda i: (-attention[i], i))
    important, places = order[: keep // 2], order[keep // 2 :]
    while (excess := len(places) - (keep - keep // 2)) > 0:
        odd, even = places[::2], places[1::2]
        near = {i: max(cosine(x[i], x[j]) for j in even) for i in odd}
        odd = sorted(odd, key=lambda i: -near[i])[min(8, excess) :]
        places = [*odd, *even]
    assert kept("visprune", given, [*important, *places])


@pytest.mark.parametrize(("grid", "keep"), [((1, 8, 8), 40), ((2, 6, 7), 60)])
def test_hiprune(grid: tuple[int, int, int], keep: int) -> None:
    given = matrix.tokens(grid)
    _, last = rows_of(given)
    middle = given.tower[MIDDLE].tolist()
    n, w = len(last), grid[2]
    chosen: set[int] = set()
    for i in best(dict(enumerate(middle)), round(keep * 0.1 / 5)):
        chosen |= {min(max(j, 0), n - 1) for j in (i, i - 1, i + 1, i - w, i + w)}
    others = {i: a for i, a in enumerate(last) if i not in chosen}
    assert kept("hiprune", given, [*chosen, *best(others, keep - len(chosen))])


def test_hiprune_takes_no_neighbours_from_the_next_picture() -> None:
    """The anchor of a picture is in its last row."""
    spans = [matrix.tokens((1, 8, 8), seed=seed) for seed in range(2)]
    for given in spans:
        given.tower[MIDDLE][59], given.tower[TOWER_ATTENTION][3] = 2.0, -1.0
    alone = [matrix.kept(make_reducer("hiprune"), given, 26).patches for given in spans]
    kept = matrix.kept(make_reducer("hiprune"), matrix.joined(spans), 26, 26).patches
    assert kept.tolist() == [*alone[0].tolist(), *(alone[1] + 64).tolist()]


def test_hiprune_reads_the_block_of_the_release() -> None:
    """The sixteenth of 32 blocks; towers of any depth have one."""
    assert MIDDLE.place(32) == 15
    assert all(MIDDLE.place(n) is not None for n in range(1, 64))


def test_hiprune_counts_places_where_tokens_are_missing() -> None:
    """Of a picture without its cells 42 and 49, the anchor at 50 has two neighbours left."""
    given = matrix.tokens((1, 8, 8))
    left = [i for i in range(64) if i not in (42, 49)]
    part = Tokens(
        given.features[left], given.grids, [1], [62], index=torch.tensor(left),
        tower={signal: torch.zeros(62) for signal in (MIDDLE, TOWER_ATTENTION)},
    )  # fmt: skip
    part.tower[MIDDLE][left.index(50)] = 1.0
    rows = matrix.kept(make_reducer("hiprune"), part, 30).patches.tolist()
    assert [left[i] for i in rows] == [*range(27), 50, 51, 58]


@pytest.mark.parametrize(("grid", "keep"), [(GRIDS[0], 20), (GRIDS[1], 1), (GRIDS[2], 9)])
def test_holov(grid: tuple[int, int, int], keep: int) -> None:
    """With the variance of the paper, which has no effect on the budgets of crops."""
    given = matrix.tokens(grid)
    x, attention = rows_of(given)
    n = len(x)
    crops = min(n, max(1, math.floor(1024 / 576 * n / keep)))
    parts, first, scores = [], 0, []
    for number in range(crops):
        length = n // crops + (number < n % crops)
        parts.append([*range(first, first + length)])
        first += length
    for part in parts:
        variance = []
        for i in part:
            row = [cosine(x[i], x[j]) if i != j else 0.0 for j in part]
            middle = sum(row) / max(len(part) - 1, 1)
            variance.append(sum((v - middle) ** 2 for v in row) / max(len(part) - 1, 1))
        level = sum(attention[i] for i in part) / len(part)
        spread = sum(variance) / len(part)
        scaled = [0.09 * v * level / spread if spread else 0.09 * level for v in variance]
        own = [attention[i] + v for i, v in zip(part, scaled, strict=True)]
        scores.append(sum(own) / len(part))
    budgets = [min(len(p), int(keep * s / sum(scores))) for p, s in zip(parts, scores, strict=True)]
    order = sorted(range(crops), key=lambda c: -scores[c])
    while sum(budgets) < keep:
        for c in order:
            if budgets[c] < len(parts[c]) and sum(budgets) < keep:
                budgets[c] += 1
    places = []
    for part, count in zip(parts, budgets, strict=True):
        places += best({i: attention[i] for i in part}, count)
    assert kept("holov", given, places)


def test_holov_rounds_shares_of_crops_down() -> None:
    """Of mean attention 2/3, 5/3 and 1: exact shares of 5 tokens are 1, 5/2 and 3/2.

    As floats, the first is less than 1. The token that is left goes to the crop of most attention.
    """
    given = matrix.tokens((1, 3, 3))
    rows = [1, 0.75, 0.25], [3, 1.25, 0.75], [2, 0.75, 0.25]
    given.tower[TOWER_ATTENTION] = torch.tensor(rows).flatten()
    assert kept("holov", given, [0, 3, 4, 5, 6])
