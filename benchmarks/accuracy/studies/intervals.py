"""How often the 95 % intervals of tables hold the true value, by simulation.

    python -m benchmarks.accuracy.studies.intervals    # accuracy/intervals.json and .md

Two methods answer the same questions, and the true shares of questions that both, only one or none
of them gets right are known. The bootstrap, which earlier tables used, is drawn for comparison.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import publishing
from benchmarks.experiment import Experiment
from tokencomp.evaluation.metrics import difference, retention

SEED, TABLES, DRAWS, FULL = 0, 4000, 2000, 0.9
ITEMS = (36, 100)
CHANGED = (0.02, 0.04, 0.06, 0.1, 0.2)
"""Shares of questions that one method alone gets right."""
LOST = {"half": 0.5, "three quarters": 0.75, "all": 1.0}
"""How many of these the compressed model gets wrong."""
KINDS = {"difference": difference, "retention": retention}
HEAD = f"""# Do the 95 % intervals hold the true value in 95 % of cases?

Per cent of {TABLES:,} simulated tables of answers in each row (known to about 0.7), seed {SEED};
the full model answers {FULL:.0%} of the questions. Tables and pages use *score intervals*: Tango
(1998) for differences, Tang, Tang and Chan (2003) for retention, [one
rule](../../tokencomp/evaluation/score_interval.py) for both. Where hardly an answer changes, 0 or 1
changed answers are all that there is to see, so no fixed rule is near 95 %: this one errs on the
safe side. The bootstrap, which earlier pages used, has no width where no answer differs.

"""
Counts = tuple[int, ...]


def shares(changed: float, lost: float) -> np.ndarray:
    """Probabilities of right by both, only compressed, only full, none; the full model has 0.9."""
    first, second = changed * (1 - lost), changed * lost
    return np.array([FULL - second, first, second, max(1 - FULL - first, 0.0)])


def scores(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Scores per question of the compressed and of the full model."""
    return np.repeat([1.0, 1, 0, 0], counts), np.repeat([1.0, 0, 1, 0], counts)


@functools.cache
def found(statistic: Callable[..., Any], counts: Counts) -> tuple[float, float]:
    """The interval of a table of answers."""
    one = statistic(*scores(counts))
    return one.low, one.high


@functools.cache
def bootstrapped(ratio: bool, counts: Counts) -> tuple[float, float]:
    """Percentile interval of tables drawn from this one."""
    n = sum(counts)
    draws = np.random.default_rng(SEED).multinomial(n, np.array(counts) / n, DRAWS)
    first, second = draws[:, 0] + draws[:, 1], draws[:, 0] + draws[:, 2]
    values = first / np.maximum(second, 1) if ratio else (first - second) / n
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def covered(truth: float, interval: tuple[float, float]) -> bool:
    return interval[0] - 1e-9 <= truth <= interval[1] + 1e-9


def rows() -> list[dict[str, Any]]:
    """Coverage of every statistic for every number of questions and kind of change."""
    every = []
    for n in ITEMS:
        for changed in CHANGED:
            for name, lost in LOST.items():
                p = shares(changed, lost)
                drawn = np.random.default_rng(SEED).multinomial(n, p, TABLES)
                tables = [tuple(map(int, table)) for table in drawn]
                truth = float(p[1] - p[2]), float((p[0] + p[1]) / FULL)
                row: dict[str, Any] = {"items": n, "changed": changed, "lost": name}
                for ratio, (label, statistic) in enumerate(KINDS.items()):
                    hits = [covered(truth[ratio], found(statistic, t)) for t in tables]
                    old = [covered(truth[ratio], bootstrapped(bool(ratio), t)) for t in tables]
                    row |= {label: float(np.mean(hits)), f"{label}_bootstrap": float(np.mean(old))}
                every.append(row)
    return every


def seeds() -> list[dict[str, Any]]:
    """Coverage of the difference from the mean of three seeds of `random`, 1,000 samples each.

    Questions are easy or hard: the chance of a seed is 0.3 wide around its mean, the same for the
    three of them.
    """
    every = []
    for n in ITEMS:
        for accuracy, chance in ((0.97, 0.8), (0.95, 0.6), (0.8, 0.45)):
            rng, hits = np.random.default_rng(SEED), 0
            for _ in range(TABLES // 4):
                right = (rng.random(n) < accuracy).astype(float)
                mean = rng.binomial(3, chance + 0.3 * (rng.random(n) - 0.5)) / 3
                gap = difference(right, mean)
                hits += covered(accuracy - chance, (gap.low, gap.high))
            coverage = hits / (TABLES // 4)
            every.append({"items": n, "method": accuracy, "random": chance, "coverage": coverage})
    return every


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def page(stored: dict[str, Any]) -> str:
    """The page of stored coverages."""
    return HEAD + "\n".join(
        [
            by_change(stored["rows"]),
            "",
            summary(stored["rows"]),
            "## Against the mean of three seeds\n",
            by_seeds(stored["seeds"]),
        ]
    )


def by_change(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        changed = f"{100 * row['changed']:.0f} % ({row['items'] * row['changed']:.1f} of them)"
        pairs = [percent(row[f"{k}{end}"]) for k in KINDS for end in ("", "_bootstrap")]
        cells.append([str(row["items"]), changed, row["lost"], *pairs])
    head = ("questions", "one method alone is right", "for the worse")
    columns = [f"{k}, {how}" for k in KINDS for how in ("here", "bootstrap")]
    return publishing.table([*head, *columns], cells)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Mean, least and most coverage where at least four answers differ on average."""
    lines = []
    for n in ITEMS:
        for few in (True, False):
            some = [r for r in rows if r["items"] == n and (n * r["changed"] < 4) == few]
            values = [100 * r[k] for r in some for k in KINDS]
            old = [100 * r[f"{k}_bootstrap"] for r in some for k in KINDS]
            what = "fewer than 4" if few else "4 or more"
            lines.append(
                f"- {n} questions, {what} changed answers on average: mean "
                f"{np.mean(values):.1f} % ({min(values):.1f} to {max(values):.1f}); bootstrap "
                f"{np.mean(old):.1f} % ({min(old):.1f} to {max(old):.1f})."
            )
    return "\n".join([*lines, ""])


def by_seeds(rows: Sequence[dict[str, Any]]) -> str:
    head = ("questions", "accuracy of the method", "of `random`", "covered")
    return publishing.table(
        head,
        [
            [str(r["items"]), f"{r['method']:.0%}", f"{r['random']:.0%}", percent(r["coverage"])]
            for r in rows
        ],
    )


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All coverages; `args` has no option that they depend on."""
    yield {"rows": rows(), "seeds": seeds()}


EXPERIMENT = Experiment("accuracy/intervals", measure, page, rows=lambda stored: stored["rows"])

if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
