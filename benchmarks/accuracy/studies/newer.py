"""First accuracy of the newer methods on validation questions: the page of stored answers.

    python -m benchmarks.accuracy.studies.newer    # newer.md

The answers are those of `benchmarks.accuracy.run --split validation` with --out newer (images) or
newer-videos; the commands are on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.report import EARLIER
from benchmarks.accuracy.store import ACCURACY, Results
from benchmarks.experiment import Files, write
from tokencomp.evaluation.metrics import difference

MODEL = "tiny-qwen3-vl"
SETS = {"newer": ("images", "kcenter"), "newer-videos": ("videos", "auto")}
"""Folder: what the questions are about, and the label of the default."""
HEAD = """# What do the newest methods keep on validation questions?

`python -m benchmarks.accuracy.studies.newer`. Accuracy kept by the tiny Qwen3-VL. The default was
chosen on these questions, which favours it. `random` is the mean of its seeds. [Differences from
the default with intervals](../README.md#tables-as-csv)."""


def method(results: Results, label: str) -> str:
    """The reducer with its options, as Python has them."""
    setting = results.settings[label]
    options = "".join(f", {k}={v!r}" for k, v in sorted(setting["options"].items()))
    earlier = " (earlier rule)" if setting.get("method") in EARLIER else ""
    seeds = f" ({len(results.seeds[label])} seeds)" if label in results.seeds else ""
    return f"`{setting['reducer']}{options}`{seeds}{earlier}"


def records(results: Results, kind: str, default: str) -> list[dict[str, Any]]:
    """Every setting; the difference to the default in accuracy, with its 95 % interval."""
    full, rows = sum(results.scores("full")), []
    for label, setting in results.settings.items():
        if setting["ratio"]:
            scores, base = results.scores(label), f"{default}-{setting['ratio']:g}"
            gap = difference(scores, results.scores(base)) if label != base else None
            facts = {"kind": kind, "method": method(results, label), "ratio": setting["ratio"]}
            facts |= {"kept": sum(scores) / full}
            parts = {"vs_default": "value", "low": "low", "high": "high"}
            rows.append(facts | {k: gap and getattr(gap, v) for k, v in parts.items()})
    return rows


def table(rows: Sequence[dict[str, Any]], ratios: Sequence[float]) -> str:
    """The best at the lowest ratio first."""
    found = {(r["method"], r["ratio"]): r["kept"] for r in rows}
    names = dict.fromkeys(r["method"] for r in rows)
    order = sorted(names, key=lambda name: -found[name, ratios[0]])
    body = [[name, *(f"{found[name, ratio]:.1%}" for ratio in ratios)] for name in order]
    return publishing.table(("method", *(f"ratio {r:g}" for r in ratios)), body)


def files() -> Files:
    """The page with both tables and the commands that answered the questions; its CSV file."""
    parts, every = [HEAD], []
    for folder, (kind, default) in SETS.items():
        results = Results.read(ACCURACY / folder / MODEL, "validation").averaged()
        rows = records(results, kind, default)
        families = ", ".join(results.families)
        every += rows
        parts += [
            f"## {kind.capitalize()}: {len(results.answers.questions)} questions ({families})",
            table(rows, results.ratios),
            "\n".join(f"- {publishing.provenance(run)}" for run in results.manifest["runs"]),
        ]
    text, data = "\n\n".join(parts) + "\n", publishing.csv_text(every)
    return {ACCURACY / "newer.md": text, ACCURACY / "newer.csv": data}


if __name__ == "__main__":
    write(files())
