"""Similarity merging in plain loops over Python numbers, for any frames that are left."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """A token: where it stands, how many it stands for, its features.

    Of the features, those from `metric` on are compared.
    """

    place: int
    size: float
    x: list[float]
    metric: int = 0


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))


def patches_of(length: int, others: set[int], grid: tuple[int, int, int]) -> dict[int, int]:
    """Frame of every offset of an uncompressed span that is a patch."""
    offsets = [o for o in range(length) if o not in others]
    return {o: i // (grid[1] * grid[2]) for i, o in enumerate(offsets)}


def rows_of(x: torch.Tensor, offsets: list[int], frame: dict[int, int]) -> list[list[Row]]:
    """The live patches, frame by frame; row i of `x` is the token at `offsets[i]`."""
    frames: dict[int, list[Row]] = {}
    for value, offset in zip(x.double().tolist(), offsets, strict=True):
        if offset in frame:
            frames.setdefault(frame[offset], []).append(Row(offset, 1.0, value))
    return [frames[f] for f in sorted(frames)]


def merge(frames: list[list[Row]], budget: int) -> list[Row]:
    """What is left of `frames` at `budget` tokens, weighted means, in raster order."""
    parts = min(len(frames), budget)
    groups: list[list[Row]] = [[] for _ in range(parts)]
    for i, rows in enumerate(frames):  # group g begins at frame g·F // parts
        groups[max(g for g in range(parts) if g * len(frames) // parts <= i)] += rows
    spare, given, seen, left = budget - parts, 0, 0, []
    room = sum(len(g) - 1 for g in groups)
    for group in groups:
        seen += len(group) - 1
        more = spare * seen // room - given if room else 0
        given += more
        left += merge_group(group, 1 + more)
    return left


def merge_group(rows: list[Row], keep: int, weighted: bool = True) -> list[Row]:
    """Bipartite steps, the best pairs first, until `keep` rows are left; plain means unweighted."""
    while len(rows) > keep:
        best = []
        for a in range(0, len(rows), 2):
            scored = [
                (cosine(rows[a].x[rows[a].metric :], rows[b].x[rows[b].metric :]), -b)
                for b in range(1, len(rows), 2)
            ]
            value, minus = max(scored)
            best.append((-value, a, -minus))
        into = {a: b for _, a, b in sorted(best)[: min(len(rows) - keep, len(rows) // 2)]}
        merged = []
        for i, row in enumerate(rows):
            if i in into:
                continue
            members = [row, *(rows[a] for a, b in into.items() if b == i)]
            size = sum(m.size for m in members)
            columns = zip(*([m.size * v for v in m.x] for m in members), strict=True)
            x = [sum(c) / size for c in columns]
            merged.append(row._replace(size=size if weighted else 1.0, x=x))
        rows = merged
    return rows
