"""Methods for videos that read the vision tower, against plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from support import matrix
from support.tower_loops import (
    Rows,
    Vector,
    best,
    check,
    clip,
    cosine,
    dot,
    evenly,
    largest_remainders,
    mean,
    mix,
    peaks,
    rows_of,
)

from tokencomp import Kept, make_reducer
from tokencomp.reducers._segments import segments, static_segments

CLIPS = [(1, 4, 5), (4, 3, 4), (9, 2, 3), (12, 3, 3)]
every_clip = pytest.mark.parametrize("grid", CLIPS, ids=str)


def cut(x: list[Vector], n: int, least: int) -> list[list[int]]:
    """Frames of every segment of like frames."""
    means = [mean(x[f : f + n]) for f in range(0, len(x), n)]
    like = [cosine(a, b) for a, b in itertools.pairwise(means)]
    lengths = segments(np.array(like), 0.9, least)
    ends = np.cumsum([0, *lengths]).tolist()
    return [[*range(a, b)] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize(
    ("grid", "least", "share"),
    [(CLIPS[0], 1, 0.4), (CLIPS[1], 1, 0.8), (CLIPS[2], 1, 0.15), (CLIPS[3], 8, 0.4)],
)
def test_fastvid(grid: tuple[int, int, int], least: int, share: float) -> None:
    given = clip(grid)
    x, attention = rows_of(given)
    t, n = grid[0], grid[1] * grid[2]
    keep = round(share * t * n)
    each = evenly(keep, [n] * t)
    context = [k * 2 // 5 for k in each]
    rows: Rows = []
    for frames in cut(x, n, least):
        salient = {f: each[f] - context[f] for f in frames}
        anchors = [f for i, f in enumerate(reversed(frames)) if i % 4 == 0][::-1]
        room = [n - salient[f] for f in anchors]
        total = sum(context[f] for f in frames)
        counts = dict(zip(anchors, evenly(min(total, sum(room)), room), strict=True))
        others = [f for f in frames if f not in anchors]
        more = evenly(total - sum(counts.values()), [n - salient[f] for f in others])
        for f, count in zip(others, more, strict=True):
            salient[f] += count
        chosen = []
        for f in frames:
            chosen += best({i: attention[i] for i in range(f * n, f * n + n)}, salient[f])
        rows += [(i, x[i], 1.0) for i in chosen]
        rest = [i for f in frames for i in range(f * n, f * n + n) if i not in chosen]
        used = [f for f in anchors if counts[f]]
        for f in used:
            own = [i for i in rest if i // n == f]
            centres = [own[c] for c in peaks([x[i] for i in own], counts[f], 4)[0]]
            members: dict[int, list[int]] = {c: [] for c in centres}
            for i in rest:
                members[max(centres, key=lambda c: (cosine(x[i], x[c]), -c))].append(i)
            for c, near in members.items():
                value = x[c]
                if near:
                    weight = max(1 / (len(near) + 1), 0.6)
                    value = mix(weight, x[c], mean([x[i] for i in near]))
                rows.append((c, value, max(1.0, len(near) / len(used))))
    check(matrix.kept(make_reducer("fastvid", least=least), given, keep), rows)


def still(x: list[Vector], n: int, keep: int) -> list[tuple[list[int], list[int]]]:
    """Frames and static places of every window; `keep` rows can be chosen from what is left."""
    t = len(x) // n
    like = [[cosine(x[f * n + i], x[(f + 1) * n + i]) for i in range(n)] for f in range(t - 1)]
    static = np.array([[c > 0.8 for c in row] for row in like], dtype=bool).reshape(t - 1, n)
    windows, first, found = [], 0, []
    for length in static_segments(static):
        frames = [*range(first, first + length)]
        windows.append((frames, []))
        for i in range(n) if length > 1 else ():
            least = min(like[f][i] for f in frames[:-1])
            if least > 0.8:
                found.append((-least, len(windows) - 1, i))
        first += length
    room = t * n - keep
    for _, number, place in sorted(found):
        frames, places = windows[number]
        room -= len(frames) - 1
        if room < 0:
            break
        places.append(place)
    return [(frames, sorted(places)) for frames, places in windows]


@pytest.mark.parametrize(
    ("grid", "share"), [(CLIPS[0], 0.4), (CLIPS[1], 0.9), (CLIPS[2], 0.15), (CLIPS[3], 0.4)]
)
def test_holitom(grid: tuple[int, int, int], share: float) -> None:
    given = clip(grid)
    x, attention = rows_of(given)
    t, n = grid[0], grid[1] * grid[2]
    keep = round(share * t * n)
    windows = still(x, n, keep)
    moving = [[i for i in range(n) if i not in places] for fs, places in windows for _ in fs]
    sizes = [len(places) for _, places in windows] + [len(own) for own in moving]
    budgets = largest_remainders(sizes, keep)
    rows: Rows = []
    for (frames, places), count in zip(windows, budgets, strict=False):
        if not count:
            continue
        means = [mean([x[f * n + i] for f in frames]) for i in places]
        centres, labels = peaks(means, count, min(7, count))
        for number, c in enumerate(centres):
            others = [means[i] for i in range(len(means)) if labels[i] == number and i != c]
            value = mix(0.6, means[c], mean(others)) if others else means[c]
            size = float(len(frames) * (len(others) + 1))
            rows.append((frames[0] * n + places[c], value, size))
    for f, (own, count) in enumerate(zip(moving, budgets[len(windows) :], strict=True)):
        chosen = best({f * n + i: attention[f * n + i] for i in own}, count)
        rows += [(i, x[i], 1.0) for i in chosen]
    if t > 1:
        assert any(len(frames) > 1 and places for frames, places in windows)
    check(matrix.kept(make_reducer("holitom"), given, keep), rows)


def turned(row: Vector, at: tuple[int, int, int]) -> Vector:
    """The unit vector, its thirds rotated by time, row and column."""
    length = math.sqrt(dot(row, row))
    unit, third, out = [v / length for v in row], len(row) // 6 * 2, []
    parts = unit[:third], unit[third : 2 * third], unit[2 * third :]
    for part, place, base in zip(parts, at, (1e4, 1e3, 1e3), strict=True):
        half = len(part) // 2
        angles = [place * base ** (-i / half) for i in range(half)]
        first = [part[i] * math.cos(a) - part[half + i] * math.sin(a) for i, a in enumerate(angles)]
        second = [
            part[half + i] * math.cos(a) + part[i] * math.sin(a) for i, a in enumerate(angles)
        ]
        out += [*first, *second]
    return out


def shared(weights: list[int], rooms: list[int], total: int) -> list[int]:
    """Largest remainders; what a full group cannot hold the others get, one after the other."""
    counts = [min(*both) for both in zip(largest_remainders(weights, total), rooms, strict=True)]
    shares = [total * w / sum(weights) for w in weights]
    order = sorted(range(len(counts)), key=lambda i: (int(shares[i]) - shares[i], i))
    while sum(counts) < total:
        for i in order:
            counts[i] += counts[i] < rooms[i] and sum(counts) < total
    return counts


@every_clip
@pytest.mark.parametrize("context", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("share", [0.15, 0.4, 0.9])
def test_tango(grid: tuple[int, int, int], share: float, context: float) -> None:
    given = clip(grid)
    x, attention = rows_of(given)
    (t, h, w), n = grid, grid[1] * grid[2]
    keep = round(share * t * n)
    windows = still(x, n, keep)
    rooms = [len(fs) * n - (len(fs) - 1) * len(places) for fs, places in windows]
    budgets = shared([len(fs) for fs, _ in windows], rooms, keep)
    rows: Rows = []

    def seen(own: list[int]) -> Vector:
        first = own[0]
        return turned(x[first], (first // (h * w), first // w % h, first % w))

    for (frames, places), budget in zip(windows, budgets, strict=True):
        moving = [i for i in range(n) if i not in places]
        groups = [[[f * n + i for f in frames] for i in places]]
        groups += [[[f * n + i] for i in moving] for f in frames]
        counts = largest_remainders([*map(len, groups)], budget)
        pools = [(groups[:1], counts[:1]), (groups[1:], counts[1:])]
        for pool, number_of in pools:
            left, clusters = [], 0
            for group, count in zip(pool, number_of, strict=True):
                few = math.floor(count * (1 - context) + 1e-6)
                clusters += count - few
                saliency = [sum(attention[i] for i in own) / len(own) for own in group]
                candidates = best(dict(enumerate(saliency)), min(len(group), int(1.5 * few)))
                labels = peaks([seen(group[c]) for c in candidates], few, 7, True)[1] if few else []
                chosen = []
                for number in range(few):
                    own = [
                        c for c, label in zip(candidates, labels, strict=True) if label == number
                    ]
                    chosen += best({c: saliency[c] for c in own}, 1)
                rows += [
                    (group[c][0], mean([x[i] for i in group[c]]), len(group[c])) for c in chosen
                ]
                left += [own for c, own in enumerate(group) if c not in chosen]
            if not clusters:
                continue
            centres, labels = peaks([seen(own) for own in left], clusters, 7, True)
            for number, c in enumerate(centres):
                inside = [own for own, label in zip(left, labels, strict=True) if label == number]
                values = [mean([x[i] for i in own]) for own in inside]
                centre = mean([x[i] for i in left[c]])
                value = mix(max(0.6, 1 / len(inside)), centre, mean(values))
                rows.append((left[c][0], value, sum(map(len, inside))))
    got = matrix.kept(make_reducer("tango", context=context), given, keep)
    check(got, [(place, value, float(size)) for place, value, size in rows])


@pytest.mark.parametrize(
    ("grid", "least", "event", "share"),
    [
        (CLIPS[0], 1, False, 0.5),
        (CLIPS[1], 1, True, 0.15),
        (CLIPS[2], 1, False, 0.5),
        (CLIPS[2], 8, True, 0.5),
        (CLIPS[3], 8, False, 0.15),
    ],
)
def test_flashvid(grid: tuple[int, int, int], least: int, event: bool, share: float) -> None:
    given = clip(grid)
    x, attention = rows_of(given)
    t, n = grid[0], grid[1] * grid[2]
    keep = round(share * t * n)
    each = evenly(keep, [n] * t)
    rows: Rows = []
    for frames in cut(x, n, least):
        means = [mean(x[f * n : f * n + n]) for f in frames]
        free = {i for f in frames for i in range(f * n, f * n + n)}
        left = 0
        for f in frames:
            own, count = [*range(f * n, f * n + n)], -(-7 * each[f] // 10)
            left += each[f] - count
            weight = {i: attention[i] for i in own}
            if event:
                weight = {i: a * dot(x[i], mean(means)) for i, a in weight.items()}
            apart = {
                (i, j): (0.0 if i == j else 1 - cosine(x[i], x[j])) * weight[j]
                for i in own
                for j in own
            }
            near = {j: sorted(apart[i, j] for i in own)[1] for j in own}
            chosen: list[int] = []
            while len(chosen) < count:
                chosen += best({j: v for j, v in near.items() if j not in chosen}, 1)
                near = {j: min(apart[i, j] for i in chosen) for j in own}
            rows += [(i, x[i], 1.0) for i in chosen]
            free -= {*chosen}
        if not left:
            continue
        links = []
        for i in sorted(free):
            earlier = [j for j in free if j // n == i // n - 1]
            if earlier:
                parent = max(earlier, key=lambda j: (cosine(x[i], x[j]), -j))
                if cosine(x[i], x[parent]) > 0.8:
                    links.append((-cosine(x[i], x[parent]), i, parent))
        parents = {i: parent for _, i, parent in sorted(links)[: len(free) - left]}
        members: dict[int, list[int]] = {i: [] for i in free - set(parents)}
        for i in sorted(free):
            root = i
            while root in parents:
                root = parents[root]
            members[root].append(i)
        by_frame = [[i for i in sorted(members) if i // n == f] for f in frames]
        for own, count in zip(by_frame, evenly(left, [*map(len, by_frame)]), strict=True):
            if not count:
                continue
            values = [mean([x[j] for j in members[i]]) for i in own]
            centres, labels = peaks(values, count, min(7, count))
            for number, c in enumerate(centres):
                inside = [o for o, label in zip(own, labels, strict=True) if label == number]
                every = [j for i in inside for j in members[i]]
                rows.append((own[c], mean([x[j] for j in every]), float(len(every))))
    reducer = make_reducer("flashvid", least=least, event=event)
    check(matrix.kept(reducer, given, keep), rows)


@pytest.mark.parametrize("keep", [3, 9])
def test_holitom_where_nothing_moves(keep: int) -> None:
    """Of equal frames every place is one mean, or as few copies as fill the budget stay."""
    given = matrix.tokens((3, 2, 3))
    given.features[:] = given.features[:6].repeat(3, 1)
    reduction = matrix.kept(make_reducer("holitom"), given, keep)
    assert len(reduction.patches) == keep and reduction.weights.sum() == 18
    assert keep == 9 or reduction.patches.max() < 6


@pytest.mark.parametrize("name", ["fastvid", "flashvid", "holitom", "tango"])
def test_clips_of_a_batch_do_not_meet(name: str, share: float = 0.3) -> None:
    """Of several lengths and sizes, which segments and trees must not leave; each is as alone."""
    reducer = make_reducer(name, **({"least": 1} if name in ("fastvid", "flashvid") else {}))
    spans = [clip(grid) for grid in [*CLIPS, (9, 2, 3)]]
    budgets = [round(share * length) for t in spans for length in t.lengths]
    together = matrix.kept(reducer, matrix.joined(spans), *budgets)
    parts = [matrix.kept(reducer, t, k) for t, k in zip(spans, budgets, strict=True)]
    alone = Kept.joined(parts, matrix.joined(spans, *budgets))
    assert torch.equal(together.patches, alone.patches)
    torch.testing.assert_close(together.features, alone.features, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(together.weights, alone.weights)
