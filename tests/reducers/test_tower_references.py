"""Methods that read the vision tower, and their shared steps, against plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from support import matrix

from tokencomp import Reduction, VisualTokens, make_reducer
from tokencomp.reducers._clusters import distances, dpc_knn
from tokencomp.reducers._segments import segments, static_segments
from tokencomp.reducers.hiprune import MIDDLE
from tokencomp.tokens.signals import TOWER_ATTENTION, TOWER_KEYS

Vector = list[float]
Rows = list[tuple[int, Vector, float]]  # place, value, size
GRIDS = [(1, 5, 6), (4, 3, 4), (6, 2, 3)]
CLIPS = [(1, 4, 5), (4, 3, 4), (9, 2, 3), (12, 3, 3)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_clip = pytest.mark.parametrize("grid", CLIPS, ids=str)


def clip(grid: tuple[int, int, int], special: int = 2) -> VisualTokens:
    """A video with cuts: between them most places repeat, and two move."""
    given, (t, h, w) = matrix.tokens(grid, special), grid
    g = torch.Generator().manual_seed(5)
    frame = torch.randn(h * w, matrix.DIM, generator=g)
    frames = []
    for f in range(t):
        if f % 5 == 3:
            frame = torch.randn(h * w, matrix.DIM, generator=g)
        moved = frame.clone()
        moved[[f % (h * w), (3 * f + 1) % (h * w)]] = torch.randn(2, matrix.DIM, generator=g)
        frames.append(moved + 0.2 * torch.randn(h * w, matrix.DIM, generator=g))
    given.features[~given.special] = torch.cat(frames)
    return given


def rows_of(tokens: VisualTokens) -> tuple[list[Vector], list[float]]:
    """Features of the patches, and the attention that the tower's last block pays to them."""
    patch = ~tokens.special
    return tokens.features[patch].double().tolist(), tokens.tower[TOWER_ATTENTION][patch].tolist()


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def mean(rows: list[Vector]) -> Vector:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def mix(share: float, a: Vector, b: Vector) -> Vector:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def best(values: dict[int, float], k: int) -> list[int]:
    """The keys of the k largest values, ascending; ties go to the lower key."""
    return sorted(sorted(values, key=lambda i: (-values[i], i))[:k])


def largest_remainders(weights: list[int], total: int) -> list[int]:
    shares = [total * w / sum(weights) for w in weights]
    counts = [int(s + 1e-9) for s in shares]
    order = sorted(range(len(counts)), key=lambda i: (round(counts[i] - shares[i], 9), i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def evenly(total: int, sizes: list[int]) -> list[int]:
    ends = [total * sum(sizes[:i]) // max(sum(sizes), 1) for i in range(len(sizes) + 1)]
    return [b - a for a, b in itertools.pairwise(ends)]


def check(got: Reduction, tokens: VisualTokens, rows: Rows) -> None:
    """The patches of `got` are `rows`, at their places; special tokens stay as they are."""
    rows = sorted(rows)
    patch = ~tokens.special[got.keep]
    live = (~tokens.special).nonzero()[:, 0]
    assert got.keep[patch].tolist() == live[[place for place, _, _ in rows]].tolist()
    assert int((~patch).sum()) == int(tokens.special.sum())
    wanted = torch.tensor([value for _, value, _ in rows])
    torch.testing.assert_close(got.merged[patch], wanted, atol=1e-5, rtol=1e-5)
    sizes = torch.tensor([size for _, _, size in rows])
    torch.testing.assert_close(got.sizes[patch], sizes, atol=1e-5, rtol=1e-5)


def kept(name: str, tokens: VisualTokens, places: list[int]) -> bool:
    """Whether the method keeps these patches, and the special tokens."""
    live = (~tokens.special).nonzero()[:, 0]
    special = tokens.special.nonzero()[:, 0].tolist()
    expected = sorted([*live[places].tolist(), *special])
    got = make_reducer(name).reduce(tokens, len(expected)).keep.tolist()
    return got == expected


def peaks(
    x: list[Vector], clusters: int, k: int, tango: bool = False
) -> tuple[list[int], list[int]]:
    """Centres by density peaks, ascending, and the number of the centre of every row."""
    n, scale = len(x), 1.0 if tango else math.sqrt(len(x[0]))
    apart = [[math.dist(a, b) / scale for b in x] for a in x]
    if clusters == n:
        return [*range(n)], [*range(n)]
    density = []
    for i, row in enumerate(apart):
        near = sorted(row if not tango else [v for j, v in enumerate(row) if j != i])[:k]
        density.append(math.exp(-sum(v * v for v in near) / len(near)))
    most = max(map(max, apart))
    score = {}
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        score[i] = density[i] * min([apart[i][j] for j in denser], default=most)
    centres = best(score, clusters)
    labels = [min(range(clusters), key=lambda c: (apart[i][centres[c]], c)) for i in range(n)]
    for number, centre in enumerate(centres):
        labels[centre] = number
    return centres, labels


# -- shared steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("clusters", [1, 3, 8, 24])
def test_density_peaks(clusters: int, itself: bool) -> None:
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
    scale = 5**0.5 if itself else 1.0
    centres, labels = dpc_knn(distances(x) / scale, clusters, 4, itself)
    assert (centres.tolist(), labels.tolist()) == peaks(
        x.double().tolist(), clusters, 4, not itself
    )


def test_density_peaks_of_copies() -> None:
    """No noise: of equal rows the lower ones are centres, each of a cluster of its own."""
    centres, labels = dpc_knn(distances(torch.ones(6, 3)), 2, 4)
    assert centres.tolist() == [0, 1] and labels.tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("least", [1, 3, 5, 40])
@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.9])
def test_segments_are_cut_where_frames_differ(least: int, threshold: float) -> None:
    """Every cosine below the threshold, then the lowest others one by one."""
    means = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    rows = means.double().tolist()
    like = [cosine(a, b) for a, b in itertools.pairwise(rows)]
    cuts = {i for i, c in enumerate(like) if c < threshold}
    while len(cuts) + 1 < min(least, 9):
        cuts.add(min((i for i in range(8) if i not in cuts), key=lambda i: like[i]))
    ends = [0, *(c + 1 for c in sorted(cuts)), 9]
    assert segments(means, threshold, least) == [b - a for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("seed", range(6))
def test_static_segments_save_most(seed: int) -> None:
    """Against all ways to cut eight frames."""
    static = np.random.default_rng(seed).random((7, 5)) < 0.7

    def saved(lengths: list[int]) -> int:
        total = first = 0
        for length in lengths:
            total += (length - 1) * int(static[first : first + length - 1].all(0).sum())
            first += length
        return total

    ways = []
    for cuts in itertools.product([False, True], repeat=7):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 8]
        ways.append([b - a for a, b in itertools.pairwise(ends)])
    got = static_segments(static)
    assert got in ways and saved(got) == max(map(saved, ways))
    assert static_segments(np.zeros((7, 5), dtype=bool)) == [1] * 8
    assert static_segments(np.zeros((0, 5), dtype=bool)) == [1]


# -- images ---------------------------------------------------------------------------------------


@every_grid
@pytest.mark.parametrize("keep", [1, 2, 9, 20])
def test_visionzip(grid: tuple[int, int, int], keep: int) -> None:
    given = matrix.tokens(grid, special=1)
    x, attention = rows_of(given)
    keys = given.tower[TOWER_KEYS][~given.special].double().mean(1).tolist()
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
    check(make_reducer("visionzip").reduce(given, keep + 1), given, rows)


@every_grid
@pytest.mark.parametrize("keep", [1, 3, 8, 16])
def test_visprune(grid: tuple[int, int, int], keep: int) -> None:
    given = matrix.tokens(grid, special=1)
    x, attention = rows_of(given)
    order = sorted(range(len(x)), key=lambda i: (-attention[i], i))
    important, places = order[: keep // 2], order[keep // 2 :]
    while (excess := len(places) - (keep - keep // 2)) > 0:
        odd, even = places[::2], places[1::2]
        near = {i: max(cosine(x[i], x[j]) for j in even) for i in odd}
        odd = sorted(odd, key=lambda i: -near[i])[min(8, excess) :]
        places = [*odd, *even]
    assert kept("visprune", given, [*important, *places])


@pytest.mark.parametrize("grid", [(1, 8, 8), (2, 6, 7)], ids=str)
@pytest.mark.parametrize("keep", [20, 40, 60])
def test_hiprune(grid: tuple[int, int, int], keep: int) -> None:
    given = matrix.tokens(grid, special=1)
    _, last = rows_of(given)
    middle = given.tower[MIDDLE][~given.special].tolist()
    n, w = len(last), grid[2]
    chosen: set[int] = set()
    for i in best(dict(enumerate(middle)), round(keep * 0.1 / 5)):
        chosen |= {min(max(j, 0), n - 1) for j in (i, i - 1, i + 1, i - w, i + w)}
    others = {i: a for i, a in enumerate(last) if i not in chosen}
    assert kept("hiprune", given, [*chosen, *best(others, keep - len(chosen))])


def test_hiprune_counts_places_where_tokens_are_missing() -> None:
    """Of a picture without its cells 42 and 49, the anchor at 50 has two neighbours left."""
    given = matrix.tokens((1, 8, 8))
    left = [i for i in range(64) if i not in (42, 49)]
    part = VisualTokens(
        given.features[left], given.grid, given.special[left], index=torch.tensor(left),
        tower={signal: torch.zeros(62) for signal in (MIDDLE, TOWER_ATTENTION)},
    )  # fmt: skip
    part.tower[MIDDLE][left.index(50)] = 1.0
    rows = make_reducer("hiprune").reduce(part, 30).keep.tolist()
    assert [left[i] for i in rows] == [*range(27), 50, 51, 58]


@every_grid
@pytest.mark.parametrize("keep", [1, 5, 9, 20])
def test_holov(grid: tuple[int, int, int], keep: int) -> None:
    """With the variance of the paper, which has no effect on the budgets of crops."""
    given = matrix.tokens(grid, special=1)
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


# -- videos ---------------------------------------------------------------------------------------


def cut(x: list[Vector], n: int, least: int) -> list[list[int]]:
    """Frames of every segment of like frames."""
    means = [mean(x[f : f + n]) for f in range(0, len(x), n)]
    lengths = segments(torch.tensor(means), 0.9, least)
    ends = np.cumsum([0, *lengths]).tolist()
    return [[*range(a, b)] for a, b in itertools.pairwise(ends)]


@every_clip
@pytest.mark.parametrize("least", [1, 8])
@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_fastvid(grid: tuple[int, int, int], least: int, share: float) -> None:
    given = clip(grid)
    x, attention = rows_of(given)
    t, n = grid[0], grid[1] * grid[2]
    keep = round(share * t * n)
    each = evenly(keep, [n] * t)
    context = [int(k * 0.4 + 1e-9) for k in each]
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
    check(make_reducer("fastvid", least=least).reduce(given, keep + 2), given, rows)


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


@every_clip
@pytest.mark.parametrize("share", [0.15, 0.4, 0.9])
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
    check(make_reducer("holitom").reduce(given, keep + 2), given, rows)


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


@every_clip
@pytest.mark.parametrize("share", [0.15, 0.4, 0.9])
def test_tango(grid: tuple[int, int, int], share: float) -> None:
    given = clip(grid)
    x, attention = rows_of(given)
    (t, h, w), n = grid, grid[1] * grid[2]
    keep = round(share * t * n)
    groups = []
    for frames, places in still(x, n, keep):
        if places:
            groups.append([([f * n + i for f in frames]) for i in places])
        others = [i for i in range(n) if i not in places]
        groups += [[[f * n + i] for i in others] for f in frames if others]
    rows: Rows = []
    for group, count in zip(groups, largest_remainders([*map(len, groups)], keep), strict=True):
        values = [mean([x[i] for i in own]) for own in group]
        saliency = [sum(attention[i] for i in own) / len(own) for own in group]
        candidates = best(dict(enumerate(saliency)), min(len(group), int(1.5 * count)))
        places = [(i // (h * w), i // w % h, i % w) for i in (group[c][0] for c in candidates)]
        seen = [turned(values[c], at) for c, at in zip(candidates, places, strict=True)]
        labels = peaks(seen, count, 7, tango=True)[1] if count else []
        for number in range(count):
            own = [c for c, label in zip(candidates, labels, strict=True) if label == number]
            (c,) = best({c: saliency[c] for c in own}, 1)
            rows.append((group[c][0], values[c], float(len(group[c]))))
    check(make_reducer("tango").reduce(given, keep + 2), given, rows)


@every_clip
@pytest.mark.parametrize("least", [1, 8])
@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize("share", [0.15, 0.5])
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
            own, count = [*range(f * n, f * n + n)], math.ceil(0.7 * each[f] - 1e-9)
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
    check(reducer.reduce(given, keep + 2), given, rows)
