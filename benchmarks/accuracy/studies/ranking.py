"""Ranks candidates for the default by retention, with paired bootstrap intervals."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.accuracy.report import table
from benchmarks.accuracy.run import RATIOS
from benchmarks.accuracy.store import BARS, KINDS, Results
from tokencomp.evaluation.settings import FULL, Setting, label_of

Candidate = tuple[str, dict[str, Any]]
"""A reducer with its options; or candidates for images and videos, or for low and high ratios."""
BY_MODALITY, BY_RATIO = "by kind", "by ratio"
DRAWS = 4000
SHOWN = (0.5, 0.75, 0.9)
"""Ratios of the tables on pages; the CSV files have all."""


def by_modality(images: Candidate, videos: Candidate) -> Candidate:
    """One candidate for questions about images, another for those about videos."""
    return BY_MODALITY, {"images": list(images), "videos": list(videos)}


def by_ratio(low: Candidate, high: Candidate) -> Candidate:
    """One candidate where at least a tenth of the tokens stays, another where less does."""
    return BY_RATIO, {"low": list(low), "high": list(high)}


def part(candidate: Candidate, kind: str, ratio: float) -> Candidate:
    """What answers the questions of a kind at a ratio."""
    name, options = candidate
    if name == BY_MODALITY:
        return part(options[kind], kind, ratio)
    if name == BY_RATIO:
        return part(options["high" if ratio > 0.9 else "low"], kind, ratio)
    return name, options


def settings(candidate: Candidate) -> list[Setting]:
    """What has to be answered, at every ratio."""
    parts = [(part(candidate, kind, ratio), ratio) for kind in KINDS for ratio in RATIOS]
    unique = [one for i, one in enumerate(parts) if one not in parts[:i]]
    return [Setting(name, ratio, options) for (name, options), ratio in unique]


def answered(results: list[Results], candidate: Candidate) -> bool:
    """Whether every model has results at every ratio, on the modalities that it was asked."""
    return all(label(candidate, *key[1:]) in results[key[0]].settings for key in keys(results))


def label(candidate: Candidate, ratio: float, kind: str) -> str:
    """The setting whose answers count in a cell."""
    name, options = part(candidate, kind, ratio)
    return label_of(name, f"{ratio:g}", options)


def keys(results: list[Results]) -> list[tuple[int, float, str]]:
    """Model, ratio and kind of every cell that has questions."""
    every = itertools.product(range(len(results)), RATIOS, KINDS)
    return [key for key in every if results[key[0]].select(key[2], results[key[0]].learned)]


def scores(results: list[Results], candidate: Candidate) -> list[np.ndarray]:
    """(2, questions) arrays of compressed and full scores, one per cell."""
    pairs = [(key, (label(candidate, *key[1:]), FULL)) for key in keys(results)]
    return [
        np.array([results[i].scores(name, kind, results[i].learned) for name in names])
        for (i, _, kind), names in pairs
    ]


def draws(results: list[Results]) -> list[np.ndarray]:
    """Bootstrap draws of every cell; draw 0 is the sample itself.

    The draws of a model are the same at every ratio, and do not depend on the other models.
    """
    samples = []
    for i, _, kind in keys(results):
        seed = zlib.crc32(f"{results[i].manifest['model']} {kind}".encode())
        n = len(results[i].select(kind, results[i].learned))
        drawn = np.random.default_rng(seed).integers(n, size=(DRAWS, n))
        samples.append(np.vstack([np.arange(n), drawn]))
    return samples


def mean_retention(cells: list[np.ndarray], samples: list[np.ndarray]) -> np.ndarray:
    """Mean over the cells, per draw."""
    means = []
    for cell, sample in zip(cells, samples, strict=True):
        compressed, full = cell[0][sample].sum(1), cell[1][sample].sum(1)
        means.append(compressed / np.maximum(full, 1))
    return np.mean(means, axis=0)


def standing(
    groups: Sequence[tuple[Any, Sequence[Candidate]]],
) -> list[tuple[np.ndarray, list[float], float]]:
    """Candidates over groups of results, whose names for them differ.

    Returns
    -------
    list of tuple
        Per candidate: mean retention per draw, retention per cell, and points above the bar in the
        worst cell.
    """
    samples = [one for results, _ in groups for one in draws(results)]
    bars = [BARS[ratio] for results, _ in groups for _, ratio, _ in keys(results)]
    found = []
    for named in zip(*(candidates for _, candidates in groups), strict=True):
        cells = [
            cell
            for (results, _), one in zip(groups, named, strict=True)
            for cell in scores(results, one)
        ]
        kept = [float(cell[0].sum() / max(cell[1].sum(), 1)) for cell in cells]
        spare = min(value - bar for value, bar in zip(kept, bars, strict=True))
        found.append((mean_retention(cells, samples), kept, spare))
    return found


def interval(means: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Of the difference of two candidates, from their draws."""
    low, high = np.quantile((means - base)[1:], [0.025, 0.975])
    return float(low), float(high)


def rank(results: list[Results], candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Candidates by score, with the interval of the difference to the best."""
    found = standing([(results, candidates)])
    best, rows = max((means for means, *_ in found), key=lambda means: means[0]), []
    for (name, options), (means, cells, spare) in zip(candidates, found, strict=True):
        low, high = interval(means, best)
        row = {"reducer": name, "options": options, "score": float(means[0])}
        row |= {"difference": [low, high], "tied": high >= 0, "spare": spare, "cells": cells}
        rows.append(row)
    return sorted(rows, key=lambda r: -r["score"])


def compare(groups: list[tuple[list[Results], Candidate, Candidate]]) -> dict[str, Any]:
    """Two candidates over groups of models, whose stored answers name them differently.

    Returns
    -------
    dict
        Of both, in order: `scores`, and `spare` as in `rank`; `difference` of the second to the
        first, low and high; the number of `cells`.
    """
    first, second = standing([(results, pair) for results, *pair in groups])
    return {
        "scores": [float(means[0]) for means, *_ in (first, second)],
        "spare": [spare for *_, spare in (first, second)],
        "difference": interval(second[0], first[0]),
        "cells": len(first[1]),
    }


def title(candidate: Candidate) -> str:
    if candidate[0] == BY_MODALITY:
        return ", ".join(f"{title(one)} on {kind}" for kind, one in candidate[1].items())
    if candidate[0] == BY_RATIO:
        return f"{title(candidate[1]['low'])} up to 0.9, {title(candidate[1]['high'])} above"
    return f"{candidate[0]} {', '.join(f'{k}={v}' for k, v in candidate[1].items())}".strip()


def choice_table(rows: list[dict[str, Any]], chosen: Candidate, results: list[Results]) -> str:
    """Columns by modality and ratio; by ratio where all questions have one kind."""
    cells = [(ratio, kind) for _, ratio, kind in keys(results)]
    kinds = [kind for kind in KINDS if kind in {one for _, one in cells}]
    columns = list(itertools.product(SHOWN, kinds))
    head = ["candidate", "score", "difference to best (95 %)", "to spare"]
    body = []
    for r in rows:
        candidate, (low, high) = (r["reducer"], r["options"]), r["difference"]
        body.append(
            [
                f"**{title(candidate)}**" if candidate == chosen else title(candidate),
                f"{r['score']:.1%}",
                f"[{low:+.1%}, {high:+.1%}]" + (" tied" if r["tied"] else ""),
                f"{100 * r['spare']:+.2f}",
                *(mean_of(r["cells"], cells, column) for column in columns),
            ]
        )
    names = (f"{'ratio' if len(kinds) == 1 else kind} {ratio:g}" for ratio, kind in columns)
    return table([*head, *names], body)


def choice_records(
    name: str, rows: list[dict[str, Any]], results: list[Results]
) -> list[dict[str, Any]]:
    """The rows of a table for its CSV file, one column per model, modality and ratio."""
    models = [one.manifest["model"] for one in results]
    columns = [f"{models[i]}_{kind}_{ratio:g}" for i, ratio, kind in keys(results)]
    return [
        {
            "table": name,
            "candidate": title((r["reducer"], r["options"])),
            "score": r["score"],
            "difference_low": r["difference"][0],
            "difference_high": r["difference"][1],
            "tied": r["tied"],
            "spare": r["spare"],
            **dict(zip(columns, r["cells"], strict=True)),
        }
        for r in rows
    ]


def mean_of(values: list[float], cells: list[tuple[float, str]], column: tuple[float, str]) -> str:
    selected = [v for v, c in zip(values, cells, strict=True) if c == column]
    return f"{sum(selected) / len(selected):.1%}" if selected else "–"
