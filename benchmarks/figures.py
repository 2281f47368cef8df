"""The tables of figures in README.md and docs/evaluation.md, from the stored results.

    python -m benchmarks.figures    # rewrites both tables

Every row names the release, the date and the commit of its measurement. A release measures again, a
commit does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.report import kept
from benchmarks.accuracy.store import MAIN, RESULTS, Results
from benchmarks.models import prefill
from benchmarks.publishing import read_lines, table

ROOT = Path(__file__).resolve().parents[1]
RATIOS = (0.5, 0.75, 0.9)
SPEED = {
    ("image", "auto"): "image of 4,096 tokens",
    ("image", "auto merge=False"): "the same with `merge=False`",
    ("video", "auto"): "video of 4,096 tokens",
}
"""Media and method of the README's rows of speed."""
ACCURACY = {
    "the default method": ("auto-{}",),
    "`merge=False`": ("auto-{}-merge=False",),
    "`random` dropping, mean of three seeds": (
        "random-{}", "random-{}-seed=1", "random-{}-seed=2",
    ),
}  # fmt: skip
"""Labels of the answers of the tiny Qwen3-VL, one per seed."""


@dataclass(frozen=True)
class Figure:
    """One row of the README's table.

    Attributes
    ----------
    text
        The first cell.
    values
        One per ratio.
    run
        `environment` of the oldest run behind the values.
    """

    text: str
    values: list[str]
    run: Mapping[str, Any]


def measured(run: Mapping[str, Any]) -> str:
    """Release, date and commit of a run."""
    commit, _, dirty = str(run["commit"]).partition("+")
    place = f"uncommitted code on {commit[:8]}" if dirty else commit[:8]
    return f"{run['versions']['tokencomp']}, {run['date'][:10]}, {place}"


def figures() -> list[Figure]:
    """All rows, in the README's order."""
    return [*_speed(), *_accuracy()]


def _speed() -> list[Figure]:
    """The default on an image, merged and dropped, and on a video."""
    rows: list[Figure] = []
    cases = speed_records()
    for case, text in SPEED.items():
        records = [cases[case][ratio] for ratio in RATIOS]
        if not rows:
            page = "[LLM prefill](benchmarks/models/prefill.md)"
            text = f"{page} of Qwen2-VL-2B's decoder, times as fast: {text}"
        values = [f"{r['speedup']:.1f}" for r in records]
        rows.append(Figure(text, values, _oldest([r["environment"] for r in records])))
    return rows


def _oldest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return min(runs, key=lambda run: run["date"])


def speed_records() -> dict[tuple[str, str], dict[float, dict[str, Any]]]:
    """Records of Qwen2-VL-2B with 4,096 visual tokens, by media and method, then by ratio."""
    cases: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for r in read_lines(prefill.EXPERIMENT.file):
        if (r["model"], r["tokens"]) == ("qwen2-vl-2b", 4096):
            cases.setdefault((r["kind"], prefill.method_of(r)), {})[r["ratio"]] = r
    return cases


def _accuracy() -> list[Figure]:
    stored, rows = Results.read(RESULTS / MAIN, "test"), []
    results = stored.averaged()
    items, families = len(results.select("both", results.learned)), len(results.learned)
    page = "[accuracy kept](benchmarks/accuracy/README.md)"
    for text, forms in ACCURACY.items():
        shares = [kept(results, forms[0].format(ratio), "both") for ratio in RATIOS]
        labels = [form.format(ratio) for ratio in RATIOS for form in forms]
        runs = [stored.manifest["runs"][stored.settings[k]["run"]] for k in labels]
        head = f"{page} by the tiny Qwen3-VL with {text}, {items} test questions of the {families}"
        head += " kinds that it has learned to answer"
        values = [f"{share.value:.1%}" for share in shares if share]
        rows.append(Figure(f"the same with {text}" if rows else head, values, _oldest(runs)))
    return rows


def readme_table(rows: list[Figure]) -> str:
    """The table of the README."""
    head = ["", *(f"ratio {ratio:g}" for ratio in RATIOS), "measured"]
    cells = [[one.text, *one.values, measured(one.run)] for one in rows]
    return table(head, cells).replace("|  |", "| |", 1)


def speed_table() -> str:
    """Every method on Qwen2-VL-2B with 4,096 visual tokens, for docs/evaluation.md."""
    share = "reducer's own time, share of the full prefill"
    head = ["media", "method", *(f"ratio {ratio:g}" for ratio in RATIOS), share, "measured"]
    rows = []
    for case, records in speed_records().items():
        some = [records[ratio] for ratio in RATIOS]
        shares = sorted(100 * r["reduce_overhead"] for r in some)
        ends = dict.fromkeys(f"{n:.1f}" for n in (shares[0], shares[-1]))
        speeds = (f"{r['speedup']:.1f} ×" for r in some)
        rows.append([*case, *speeds, f"{' to '.join(ends)} %", measured(some[0]["environment"])])
    return table(head, rows)


def put(path: Path, heading: str, new: str) -> None:
    """Replace the first table below a heading."""
    before, _, after = path.read_text(encoding="utf-8").partition(f"{heading}\n")
    lines = after.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    stop = next(i for i, line in enumerate(lines) if i > start and not line.startswith("|"))
    text = "\n".join([*lines[:start], new, *lines[stop:]])
    path.write_text(f"{before}{heading}\n{text}\n", encoding="utf-8")


def main() -> None:
    put(ROOT / "README.md", "## How fast, and how exact", readme_table(figures()))
    put(ROOT / "docs" / "evaluation.md", "### Speed", speed_table())


if __name__ == "__main__":
    main()
