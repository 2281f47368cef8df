"""Row maps against plain lists of columns and weights: stages, turns, crops, beams, evictions."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from tokencomp import Kept
from tokencomp.engine.cache import compress_layer
from tokencomp.engine.rowmap import RowMap
from tokencomp.tokens.tokens import VisualSpan

CPU = torch.device("cpu")
PAD = None  # what a list has in place of a column at padding rows


def aligned(samples: list[list[int | None]]) -> list[list[int | None]]:
    """Samples of one length, padded on the left."""
    longest = max(map(len, samples))
    return [[PAD] * (longest - len(s)) + s for s in samples]


def check_weights(rows: RowMap, sizes: list[list[int]]) -> None:
    """Weights of every row, and their logarithms for these rows and one more."""
    assert rows.all_weights(len(sizes), CPU).int().tolist() == sizes
    logs = rows.log_weights(rows.rows + 1, torch.float32)
    expected = [[math.log(n) for n in (*row, 1)] for row in sizes]
    torch.testing.assert_close(logs[:, 0, 0], torch.tensor(expected))


def check(rows: RowMap, expected: list[list[int | None]], length: int) -> None:
    """Columns and padding of every row, and the number of columns."""
    assert (rows.rows, rows.length) == (len(expected[0]), length)
    columns, mask = rows.all_columns(len(expected), CPU).tolist(), rows.mask()
    flags = [[True] * rows.rows for _ in expected] if mask is None else mask.tolist()
    for found, real, wanted in zip(columns, flags, expected, strict=True):
        assert real == [c is not PAD for c in wanted]
        assert [c for c, r in zip(found, real, strict=True) if r] == [
            c for c in wanted if c is not PAD
        ]


def turn(draw: random.Random) -> tuple[RowMap, list[list[int | None]], int, list[list[int]]]:
    """A prompt of two samples after a stage: its map, columns, length, and weights of its rows."""
    width, spans, left, counts, kept, flat, columns = 30, [], [], [], [], 0, []
    for lengths in (draw.randint(24, 30), 30):
        first, n = width - lengths, draw.randint(8, 16)
        start = width - n - draw.randint(1, 3)
        keep = sorted(draw.sample(range(n), draw.randint(1, n - 1)))
        spans.append([VisualSpan(start, n, (1, 1, n))])
        left.append(lengths)
        counts.append([len(keep)])
        kept += [flat + i for i in keep]
        flat += n
        columns.append([*range(first, start), *(start + i for i in keep), *range(start + n, width)])
    weights = torch.tensor([draw.randint(1, 4) for _ in kept], dtype=torch.float32)
    reduction = Kept(torch.tensor(kept), weights=weights)
    before = RowMap.of_prompt(width, left, spans)
    rows, _, _ = before.keep(counts, [(0, 0), (1, 0)], reduction, CPU)
    shown = aligned(columns)
    each = iter(weights.int().tolist())
    visual = [range(s[0].start, s[0].stop) for s in spans]
    sizes = [
        [next(each) if c is not PAD and c in own else 1 for c in row]
        for row, own in zip(shown, visual, strict=True)
    ]
    assert rows.weights is not None and rows.weights.int().tolist() == sizes
    return rows, shown, width, sizes


@pytest.mark.parametrize("seed", range(8))
def test_turns(seed: int) -> None:
    """Two prompts and later tokens; then beams, and a crop into what followed the media."""
    draw = random.Random(seed)
    first, columns, length, sizes = turn(draw)
    check(first, columns, length)
    begins = [next(c for c in row if c is not PAD) for row in columns]
    assert first.first_column().tolist() == begins
    cache = RowMap(0).append(first, 2, CPU)
    cache.starts = torch.tensor(begins)
    check_weights(cache, sizes)
    second, more, width, others = turn(draw)
    cache = cache.append(second, 2, CPU)
    sizes = [a + b for a, b in zip(sizes, others, strict=True)]
    check_weights(cache, sizes)
    columns = [
        a + [PAD if c is PAD else c + length for c in b] for a, b in zip(columns, more, strict=True)
    ]
    length += width
    check(cache, columns, length)
    later = draw.randint(1, 5)  # written to the cache layer without a call of ours
    cache.rows += later
    columns = [[*row, *range(length, length + later)] for row in columns]
    length += later
    check(cache, columns, length)
    sizes = [[*row, *[1] * later] for row in sizes]
    check_weights(cache, sizes)
    order = [1, 0, 1]
    cache = cache.select(lambda t: t[order])
    columns = [columns[i] for i in order]
    sizes = [sizes[i] for i in order]
    check(cache, columns, length)
    check_weights(cache, sizes)
    assert cache.starts is not None and cache.starts.tolist() == [begins[i] for i in order]
    dropped = draw.randint(1, later)
    cache = cache.cut(cache.rows - dropped)
    check(cache, [row[:-dropped] for row in columns], length - dropped)
    check_weights(cache, [row[:-dropped] for row in sizes])


@pytest.mark.parametrize("seed", range(4))
def test_eviction(seed: int) -> None:
    draw = random.Random(seed)
    weights = torch.tensor([[1.0, 1.0, 3.0, 1.0, 3.0, 1.0]])
    cache = RowMap(20, 4, torch.tensor([[0, 1, 2, 5, 6, 9]]), weights=weights)
    columns, sizes = [0, 1, 2, 5, 6, *range(9, 24)], [1, 1, 3, 1, 3, *[1] * 15]
    check(cache, [columns], 24)
    rows = sorted(draw.sample(range(20), 9))
    cache = cache.keep_rows(torch.tensor(rows), 1)
    check(cache, [[columns[i] for i in rows]], 24)
    check_weights(cache, [[sizes[i] for i in rows]])


@pytest.mark.parametrize("seed", range(8))
def test_a_window_holds_every_column_that_it_reaches(seed: int) -> None:
    """The invariant of `CompressedSlidingLayer`, for ragged batches."""
    draw = random.Random(seed)
    rows, columns, length, _ = turn(draw)
    window = draw.choice([6, 9, 14])
    layer = DynamicSlidingWindowLayer(sliding_window=window)
    written = torch.arange(float(rows.rows))[None, None, :, None].expand(2, 1, -1, 1).clone()
    layer.update(written, written)
    compress_layer(layer, RowMap(0).append(rows, 2, CPU), False)
    held, first = layer.get_mask_sizes(1)[0] - 1, layer.get_mask_sizes(1)[1]
    assert (held, first) == (layer.keys.shape[-2], length - layer.keys.shape[-2])
    for row, keys in zip(columns, layer.keys[:, 0, :, 0].tolist(), strict=True):
        reached = [i for i, c in enumerate(row) if c is not PAD and c > length - window]
        assert set(reached) <= {int(key) for key in keys}
