"""Tables and plot of the accuracy benchmark, from its result files alone.

python benchmarks/accuracy/report.py
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokencomp.evaluation.environment import provenance
from tokencomp.evaluation.metrics import Retention, mcnemar, retention
from tokencomp.evaluation.plots import Point, lines
from tokencomp.zoo.questions import IMAGE_FAMILIES

HERE = Path(__file__).parent
BASELINES = ("random", "uniform", "downscale")


@dataclass(frozen=True)
class Results:
    """One model on one split: the manifest, and one row per item."""

    manifest: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, split: str) -> Results:
        manifest = json.loads((folder / f"{split}.json").read_text())
        text = (folder / f"{split}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        return cls(manifest, rows)

    def scores(self, label: str, kind: str = "all", families: Sequence[str] = ()) -> list[int]:
        """0 or 1 per item of one kind, in the order of the items."""
        return [r["correct"][label] for r in self.of(kind, families)]

    def of(self, kind: str, families: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Rows of one kind, of `families` alone if any of that kind are among them."""
        mine = [
            r
            for r in self.rows
            if kind in ("all", "images" if r["family"] in IMAGE_FAMILIES else "videos")
        ]
        return [r for r in mine if r["family"] in families] or mine

    def accuracy(self, label: str, family: str) -> float:
        found = self.scores(label, families=[family])
        return sum(found) / len(found)

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(r["family"] for r in self.rows))

    @property
    def learned(self) -> list[str]:
        """Families on which the full model beats the most common answer by 25 points.

        On the others there is little to lose, so retention says little.
        """
        found = []
        for family in self.families:
            answers = Counter(r["answer"] for r in self.rows if r["family"] == family)
            common = max(answers.values()) / answers.total()
            if self.accuracy("full", family) >= common + 0.25:
                found.append(family)
        return found

    @property
    def ratios(self) -> list[float]:
        return sorted({s["ratio"] for s in self.manifest["settings"].values() if s["ratio"]})

    def at(self, ratio: float) -> list[str]:
        """Labels at one ratio: baselines first, then by retention."""
        settings = self.manifest["settings"]
        labels = [k for k, s in settings.items() if s["ratio"] == ratio]
        base = [k for k in labels if settings[k]["reducer"] in BASELINES]
        rest = [k for k in labels if k not in base]
        return base + sorted(rest, key=lambda k: (-sum(self.scores(k)), k))


def kept(results: Results, label: str, kind: str) -> Retention:
    """Retention over the learned families of one kind, or over all items for "all"."""
    families = () if kind == "all" else results.learned
    return retention(results.scores(label, kind, families), results.scores("full", kind, families))


def retention_cell(results: Results, label: str, kind: str) -> str:
    found = kept(results, label, kind)
    return f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"


def ratio_table(results: Results, ratio: float, default: str) -> str:
    """Retention per kind with paired 95 % intervals, p against random, and cost."""
    settings = results.manifest["settings"]
    head = "| method | images | videos | all families | p vs random | achieved ratio | FLOPs left |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    full_flops, random = settings["full"]["flops"], f"random-{ratio:g}"
    for label in results.at(ratio):
        one = settings[label]
        test = mcnemar(results.scores(label), results.scores(random))
        sign = "" if test.p >= 0.05 or label == random else "+" if test.wins > test.losses else "−"
        p = "" if label == random else f"{test.p:.2g} {sign}"
        name = f"**{one['reducer']}**" if one["reducer"] == default else one["reducer"]
        options = ", ".join(f"{k}={v}" for k, v in one["options"].items())
        cells = [retention_cell(results, label, kind) for kind in ("images", "videos", "all")]
        cost = [p, f"{one['achieved_ratio']:.3f}", f"{one['flops'] / full_flops:.0%}"]
        rows.append("| " + " | ".join([f"{name} {options}".strip(), *cells, *cost]) + " |")
    return "\n".join(rows)


def family_table(results: Results, labels: Sequence[str]) -> str:
    """Accuracy per question family."""
    rows = ["| family | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for family in results.families:
        cells = [f"{results.accuracy(label, family):.0%}" for label in labels]
        rows.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(results: Results, kind: str) -> str:
    """Retention over ratio, one line per method, as SVG."""
    settings = results.manifest["settings"]
    series: dict[str, list[Point]] = {}
    for label, one in settings.items():
        if one["ratio"] and not one["options"]:
            point = Point(one["ratio"], kept(results, label, kind).value)
            series.setdefault(one["reducer"], []).append(point)
    order = sorted(series, key=lambda n: (n in BASELINES, -sum(p.y for p in series[n])))
    chosen = {n: series[n] for n in order}
    return lines(chosen, x="ratio removed", y=f"accuracy kept, {kind}", reference=1.0)


def bars(results: Results, default: str) -> list[str]:
    """The bars of the default reducer, met or not."""
    told = []
    for ratio, bar in ((0.75, 0.97), (0.9, 0.94), (0.95, 0.80)):
        for kind in ("images", "videos"):
            label = f"{default}-{ratio:g}"
            if label not in results.manifest["settings"]:
                continue
            found = kept(results, label, kind)
            state = "met" if found.value >= bar else "NOT met"
            told.append(f"- ratio {ratio:g}, {kind}: {found.value:.1%}, bar {bar:.0%}: {state}")
    asked = [r for r in results.ratios if f"{default}-{r:g}" in results.manifest["settings"]]
    for ratio, base in itertools.product(asked, BASELINES):
        told += against(results, f"{default}-{ratio:g}", base)
    return told


def against(results: Results, label: str, base: str) -> list[str]:
    """Where a baseline at the same ratio keeps more than `label`, or cannot be compared."""
    ratio = label.rpartition("-")[2]
    other, told = f"{base}-{ratio}", []
    reached = results.manifest["settings"][other]["achieved_ratio"]
    if reached < float(ratio) - 0.05:
        return [f"- ratio {ratio}: {base} only gets to {reached:.2f} here, so it is no baseline"]
    for kind in ("images", "videos"):
        if kept(results, label, kind).value < kept(results, other, kind).value:
            pair = [results.scores(name, kind, results.learned) for name in (label, other)]
            test = mcnemar(*pair)
            counts = f"{test.wins} items won, {test.losses} lost, p = {test.p:.2g}"
            told.append(f"- ratio {ratio}, {kind}: below {base} ({counts}): NOT met")
    return told


def section(results: Results, default: str, where: Path) -> str:
    """Everything about one model."""
    m, name = results.manifest, results.manifest["model"]
    parts = [
        f"## {name}",
        f"{m['items']} items of the {m['split']} split, greedy. {provenance(m)}.",
        f"Learned families: {', '.join(results.learned)}.",
        "Bars for the default:",
        "\n".join(bars(results, default)),
    ]
    for kind in ("images", "videos"):
        file = where / f"{name}-{kind}.svg"
        file.write_text(plot(results, kind))
        parts.append(f"![{name}, {kind}](results/{file.name})")
    for ratio in results.ratios:
        parts += [f"### {name}, ratio {ratio:g}", ratio_table(results, ratio, default)]
    shown = ["full", *(f"{default}-{r:g}" for r in results.ratios), "random-0.9", "downscale-0.9"]
    labels = [label for label in shown if label in m["settings"]]
    parts += [f"### {name}, accuracy per question family", family_table(results, labels)]
    return "\n\n".join(parts)


HEAD = """# Accuracy under compression

Made by `python benchmarks/accuracy/run.py` (`report.py` rebuilds it from `results/`). Packaged tiny
models on ShapesQA's test split, which was used for nothing else. Cells: accuracy as a fraction of
the full model's on the same items, with paired bootstrap 95 % intervals. Images and videos: over
the question families that the full model has learned (25 points above the most common answer); the
others say little about compression and count in "all families". p: exact McNemar test against
`random` over all families, + where better, − where worse (p < 0.05). `downscale`: the full model on
smaller pictures that give as many tokens. FLOPs: the decoder's prefill, the reducer's own work not
counted. How the default (bold) was chosen, on the validation split: [CHOICE.md](CHOICE.md)."""


def write_report(results: Path, where: Path) -> Path:
    """README.md and plots from every model with test results."""
    from tokencomp.patching import DEFAULT_REDUCER

    found = sorted(results.glob("*/test.json"))
    sections = [section(Results.read(f.parent, "test"), DEFAULT_REDUCER, results) for f in found]
    path = where / "README.md"
    path.write_text("\n\n".join([HEAD, *sections]) + "\n")
    return path


if __name__ == "__main__":
    print(write_report(HERE / "results", HERE))
