"""Tables of the accuracy benchmark, as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from results import KINDS, Results, kind_of

from tokencomp.evaluation.metrics import McNemar, Retention, mcnemar, retention
from tokencomp.evaluation.settings import DOWNSCALE, FULL

BASELINES = ("random", "uniform", DOWNSCALE)
SLACK = 0.05  # of the ratio, for a baseline that cannot reach it exactly
NONE = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kept(results: Results, label: str, kind: str) -> Retention | None:
    """Retention over the learned families of "images", "videos" or "both", or over "all" items.

    None without such items, or for a baseline that does not get down to the ratio there.
    """
    families = None if kind == "all" else results.learned
    mine = results.scores(label, kind, families)
    if not mine or not reaches(results, label, kind):
        return None
    return retention(mine, results.scores(FULL, kind, families))


def reaches(results: Results, label: str, kind: str) -> bool:
    """Whether a baseline drops as many tokens as its ratio says, within `SLACK`."""
    one = results.settings[label]
    base = one["reducer"] in BASELINES
    return not base or results.reached(label, kind) >= one["ratio"] - SLACK


def cell(found: Retention | None, interval: bool = True) -> str:
    if found is None:
        return NONE
    return str(found) if interval else f"{found.value:.1%}"


def name(one: dict[str, Any], default: str) -> str:
    """Reducer and options; bold where it is the default."""
    options = ", ".join(f"{k}={v}" for k, v in one["options"].items())
    bold = one["reducer"] == default and not options
    return f"**{one['reducer']}**" if bold else f"{one['reducer']} {options}".strip()


def at(results: Results, ratio: float) -> list[str]:
    """Labels at one ratio: baselines first, the rest by the items they got right."""
    settings = results.settings
    labels = [k for k, s in settings.items() if s["ratio"] == ratio]
    base = [k for b in BASELINES for k in labels if settings[k]["reducer"] == b]
    rest = [k for k in labels if k not in base]
    return base + sorted(rest, key=lambda k: (-sum(results.scores(k)), k))


def ratio_table(results: Results, ratio: float, default: str) -> str:
    """Retention with paired 95 % intervals, p against random, and cost."""
    tests = ["p vs random", f"p vs {default}"]
    head = ["method", *KINDS, "both", "all families", *tests, "achieved ratio", "FLOPs left"]
    rows = []
    for label in at(results, ratio):
        one = results.settings[label]
        flops = one["flops"] / results.settings[FULL]["flops"]
        cells = [cell(kept(results, label, kind)) for kind in (*KINDS, "both", "all")]
        achieved = [f"{results.reached(label, k):.3f}" for k in KINDS]
        same = reaches(results, label, "both")
        told = f"{one['achieved_ratio']:.3f}" if same else " / ".join(achieved)
        p = [against(results, label, f"{base}-{ratio:g}") for base in ("random", default)]
        rows.append([name(one, default), *cells, *p, told, f"{flops:.0%}"])
    return table(head, rows)


def against(results: Results, label: str, base: str) -> str:
    """p of `label` against `base`, + where better, − where worse."""
    missing = base not in results.settings or not results.scores(label, "both", results.learned)
    if label == base or missing or not reaches(results, label, "both"):
        return ""
    test = compared(results, label, base, "both")
    sign = "" if test.p >= 0.05 else " +" if test.wins > test.losses else " −"
    return f"{test.p:.2g}{sign}"


def compared(results: Results, label: str, base: str, kind: str) -> McNemar:
    """McNemar over the learned families of one kind."""
    pair = [results.scores(one, kind, results.learned) for one in (label, base)]
    return mcnemar(*pair)


@dataclass(frozen=True)
class Comparison:
    """The default and a baseline at the same ratio, on one family."""

    family: str
    learned: bool
    ratio: float
    base: str
    default: float
    baseline: float
    full: float
    test: McNemar

    @property
    def lost(self) -> bool:
        return self.default < self.baseline


def rivals(results: Results, default: str) -> Iterator[tuple[float, str, str, str]]:
    """Ratio, baseline's name, labels of the default and of the baseline, where both were asked."""
    for ratio, base in itertools.product(results.ratios, BASELINES):
        mine, other = f"{default}-{ratio:g}", f"{base}-{ratio:g}"
        if {mine, other} <= results.settings.keys():
            yield ratio, base, mine, other


def compare_families(results: Results, default: str) -> list[Comparison]:
    """Family × ratio × baseline."""
    found = []
    for (ratio, base, *labels), family in itertools.product(
        rivals(results, default), results.families
    ):
        if reaches(results, labels[1], kind_of(family)):
            test = mcnemar(*(results.scores(k, families=[family]) for k in labels))
            mine, other, full = (results.accuracy(k, family) for k in (*labels, FULL))
            known = family in results.learned
            found.append(Comparison(family, known, ratio, base, mine, other, full, test))
    return found


def loss_table(losses: Sequence[Comparison]) -> str:
    head = ["family", "learned", "ratio", "baseline", "full", "default", "baseline's"]
    rows = [
        [
            one.family,
            "yes" if one.learned else "no",
            f"{one.ratio:g}",
            one.base,
            *(f"{a:.0%}" for a in (one.full, one.default, one.baseline)),
            str(one.test.wins),
            str(one.test.losses),
            f"{one.test.p:.2g}",
        ]
        for one in sorted(losses, key=lambda x: (x.family, x.ratio))
    ]
    return table([*head, "won", "lost", "p"], rows)


def family_table(results: Results, labels: Sequence[str]) -> str:
    """Accuracy per question family."""

    def told(label: str, family: str) -> str:
        known = reaches(results, label, kind_of(family))
        return f"{results.accuracy(label, family):.0%}" if known else NONE

    rows = [[f, *(told(label, f) for label in labels)] for f in results.families]
    return table(["family", *labels], rows)
