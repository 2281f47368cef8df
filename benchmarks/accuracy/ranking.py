"""Ranks candidates for the default by retention, with paired bootstrap intervals."""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import numpy as np
from results import BARS, KINDS, Results
from run import RATIOS

from tokencomp.evaluation.settings import FULL, Setting

Candidate = tuple[str, dict[str, Any]]
DRAWS = 4000


def settings(candidate: Candidate) -> list[Setting]:
    name, options = candidate
    return [Setting(name, ratio, options) for ratio in RATIOS]


def answered(results: list[Results], candidate: Candidate) -> bool:
    """Whether every model was asked at every ratio."""
    labels = {s.label for s in settings(candidate)}
    return all(labels <= one.settings.keys() for one in results)


def keys(results: list[Results]) -> list[tuple[int, float, str]]:
    """Model, ratio and kind of every cell that has items."""
    every = itertools.product(range(len(results)), RATIOS, KINDS)
    return [key for key in every if results[key[0]].of(key[2], results[key[0]].learned)]


def scores(results: list[Results], candidate: Candidate) -> list[np.ndarray]:
    """(2, items) arrays of compressed and full scores, one per cell."""
    labels = {s.ratio: s.label for s in settings(candidate)}
    return [
        np.array([results[i].scores(k, kind, results[i].learned) for k in (labels[ratio], FULL)])
        for i, ratio, kind in keys(results)
    ]


def draws(results: list[Results]) -> list[np.ndarray]:
    """Bootstrap draws of every cell; draw 0 is the sample itself.

    A model's items are drawn alike at every ratio, and whatever other models take part.
    """
    found = []
    for i, _, kind in keys(results):
        seed = zlib.crc32(f"{results[i].manifest['model']} {kind}".encode())
        n = len(results[i].of(kind, results[i].learned))
        drawn = np.random.default_rng(seed).integers(n, size=(DRAWS, n))
        found.append(np.vstack([np.arange(n), drawn]))
    return found


def mean_retention(parts: list[np.ndarray], drawn: list[np.ndarray]) -> np.ndarray:
    """Mean over the cells, per draw."""
    means = []
    for part, draw in zip(parts, drawn, strict=True):
        mine, full = part[0][draw].sum(1), part[1][draw].sum(1)
        means.append(mine / np.maximum(full, 1))
    return np.mean(means, axis=0)


def rank(results: list[Results], candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Candidates by score, with the interval of the difference to the best."""
    drawn = draws(results)
    parts = [scores(results, c) for c in candidates]
    means = [mean_retention(part, drawn) for part in parts]
    best, rows = max(means, key=lambda s: s[0]), []
    for (name, options), part, mine in zip(candidates, parts, means, strict=True):
        low, high = np.quantile((mine - best)[1:], [0.025, 0.975])
        each = [float(p[0].sum() / max(p[1].sum(), 1)) for p in part]
        rows.append(
            {
                "reducer": name,
                "options": options,
                "score": float(mine[0]),
                "difference": [float(low), float(high)],
                "tied": bool(high >= 0),
                "spare": min(v - BARS[k[1]] for v, k in zip(each, keys(results), strict=True)),
                "cells": each,
            }
        )
    return sorted(rows, key=lambda r: -r["score"])
