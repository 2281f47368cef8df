"""The tables of figures in README.md and docs/evaluation.md, and whether today's code gives them.

    python -m benchmarks.figures    # rewrites both tables from the result files

A row is current if the commit that gave its results is in the history, and nothing that they
measure has changed since, or if `python -m benchmarks.confirm` has asked its questions again since
then and got the stored answers. Every other row says which method was measured, when and at which
commit. `pytest -m long tests/test_readme.py` refuses a row without that.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.store import MAIN, RESULTS, Results
from benchmarks.accuracy.tables import kept
from benchmarks.models.measured import kind_of, method_of
from benchmarks.models.prefill import FOLDER as MODELS
from benchmarks.publishing import read_lines, table
from benchmarks.stored import today
from tokencomp.evaluation.environment import git

ROOT = Path(__file__).resolve().parents[1]
RATIOS = (0.5, 0.75, 0.9)
LEAST = 300
"""Questions that a confirmation has to ask for one row."""
CONFIRMED = RESULTS / MAIN / "confirmed.json"
ENGINE = (
    *(f"tokencomp/{name}" for name in ("engine", "plan", "tokens", "adapters", "torchlib")),
    *(f"tokencomp/{name}.py" for name in ("handle", "method", "patching")),
    *(
        "kernels",
        "tokencomp/inputs/prompts.py",
        "tokencomp/reducers/_batch.py",
        "tokencomp/reducers/base.py",
    ),
)
REDUCERS = {
    "auto": ("auto", "kcenter", "condiv", "uniform", "_pixels"),
    "condiv": ("condiv",),
    "random": ("random",),
}
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "default": ("auto", {}, "the default method"),
    "drop": ("auto", {"merge": False}, "`merge=False`"),
    "random": ("random", {}, "`random` dropping, mean of three seeds"),
}
"""Reducer, options, and how a row calls the method."""
LABELS = {
    "default": ("auto-{}",),
    "drop": ("auto-{}-merge=False",),
    "random": ("random-{}", "random-{}-seed=1", "random-{}-seed=2"),
}
"""What the stored answers of the tiny Qwen3-VL are called, one label per seed."""


@dataclass(frozen=True)
class Figure:
    """One row of the README's table.

    Attributes
    ----------
    text
        The first cell, without a mark.
    reducer
        What the results call the method.
    values
        One per ratio.
    run
        `commit` and `date` of the results.
    confirmation
        What `benchmarks.confirm` stored about exactly these results, if anything.
    """

    text: str
    reducer: str
    values: list[str]
    run: Mapping[str, Any]
    confirmation: Mapping[str, Any] | None = None

    @property
    def code(self) -> list[str]:
        """Paths of the code that is measured."""
        return [*ENGINE, *(f"tokencomp/reducers/{name}.py" for name in REDUCERS[self.reducer])]

    @property
    def mark(self) -> str:
        """Method, date and commit of results that are older than the code."""
        commit, _, dirty = str(self.run["commit"]).partition("+")
        place = f"uncommitted code on {commit[:8]}" if dirty else f"at {commit[:8]}"
        return f" (`{self.reducer}`, {self.run['date'][:10]}, {place})"


def outdated(figure: Figure, root: Path = ROOT) -> str:
    """Why today's code may give another figure; "" where it does not."""
    reason = changed(figure.run, figure.code, root)
    again = figure.confirmation
    if not reason.startswith("changed") or again is None:
        return reason
    if again["asked"] < LEAST or again["different"]:
        return f"{reason}; {again['different']} of {again['asked']} answers differ today"
    return changed(again, figure.code, root)


def changed(run: Mapping[str, Any], code: Sequence[str], root: Path) -> str:
    """Why a run is not one of today's code; "" where it is."""
    commit = str(run["commit"])
    if "+" in commit:
        return f"made from uncommitted code on {commit[:8]}"
    try:
        git(root, "merge-base", "--is-ancestor", commit, "HEAD")
    except subprocess.CalledProcessError:
        return f"commit {commit[:8]} is not in the history"
    names = git(root, "diff", "--name-only", "--no-renames", commit, "HEAD", "--", *code)
    paths = [p for p in names.splitlines() if _code(root, commit, p) != _code(root, "HEAD", p)]
    if not paths:
        return ""
    last = git(root, "log", "-1", "--format=%h %s", f"{commit}..HEAD", "--", *paths)
    return f"changed since {commit[:8]}, last by {last}"


def _code(root: Path, commit: str, path: str) -> str:
    """A file at a commit without comments and docstrings, which no measurement sees; "" if none."""
    try:
        text = git(root, "show", f"{commit}:{path}")
    except subprocess.CalledProcessError:
        return ""
    if not path.endswith(".py"):
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def figures() -> list[Figure]:
    """All rows, in the README's order."""
    return [*_speed(), *_accuracy()]


def _speed() -> list[Figure]:
    """The default on an image, merged and dropped, and on a video; until then `condiv`."""
    rows: list[Figure] = []
    names = {
        ("image", "auto"): "image of 4,096 tokens",
        ("image", "auto merge=False"): "the same with `merge=False`",
        ("video", "auto"): "video of 4,096 tokens",
    }
    cases = speed_records()
    if ("video", "auto") not in cases:
        names["video", "condiv"] = "video of 4,096 tokens"
    for case, text in names.items():
        if case in cases:
            records = [cases[case][ratio] for ratio in RATIOS]
            if not rows:
                page = "[LLM prefill](benchmarks/models/prefill.md)"
                text = f"{page} of Qwen2-VL-2B's decoder, times as fast: {text}"
            values = [f"{r['speedup']:.1f}" for r in records]
            run = min((r["environment"] for r in records), key=lambda run: run["date"])
            rows.append(Figure(text, records[0]["reducer"], values, run))
    return rows


def speed_records() -> dict[tuple[str, str], dict[float, dict[str, Any]]]:
    """Records of Qwen2-VL-2B with 4,096 visual tokens, by media and method, then by ratio."""
    cases: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for r in today(read_lines(MODELS / "prefill.jsonl")):
        if (r["model"], r["tokens"]) == ("qwen2-vl-2b", 4096):
            cases.setdefault((kind_of(r), method_of(r)), {})[r["ratio"]] = r
    return cases


def labels(name: str) -> list[str]:
    """Labels of stored answers of one of `METHODS`, all ratios and seeds."""
    return [form.format(ratio) for ratio in RATIOS for form in LABELS[name]]


def digest(answers: PackedAnswers, name: str) -> str:
    """Tells whether stored answers are those that were confirmed."""
    bits = [answers.correct[k] + answers.agrees[k] for k in labels(name)]
    return hashlib.sha256(json.dumps(bits).encode()).hexdigest()[:16]


def _accuracy() -> list[Figure]:
    stored, rows = Results.read(RESULTS / MAIN, "test"), []
    results = stored.averaged()
    again = json.loads(CONFIRMED.read_text()) if CONFIRMED.exists() else {"rows": {}}
    items, families = len(results.select("both", results.learned)), len(results.learned)
    for name, (reducer, _, text) in METHODS.items():
        shares = [kept(results, LABELS[name][0].format(ratio), "both") for ratio in RATIOS]
        values = [f"{share.value:.1%}" for share in shares if share]
        runs = [stored.manifest["runs"][stored.settings[k]["run"]] for k in labels(name)]
        head = (
            f"[accuracy kept](benchmarks/accuracy/README.md) by the tiny Qwen3-VL with {text}, "
            f"{items} questions of {families} kinds"
        )
        known = again["rows"].get(name)
        if known and known["stored"] == digest(stored.answers, name):
            known = {**known, "commit": again["about"]["commit"]}
        else:
            known = None
        run = min(runs, key=lambda run: run["date"])
        text = f"the same with {text}" if rows else head
        rows.append(Figure(text, reducer, values, run, known))
    return rows


def readme_table(rows: Iterable[Figure], root: Path = ROOT) -> str:
    """The table of the README, with a mark on every row that is not current."""
    head = ["", *(f"ratio {ratio:g}" for ratio in RATIOS)]
    cells = [[f.text + (f.mark if outdated(f, root) else ""), *f.values] for f in rows]
    return table(head, cells).replace("|  |", "| |", 1)


def speed_table() -> str:
    """Every method on Qwen2-VL-2B with 4,096 visual tokens, for docs/evaluation.md."""
    share = "reducer's own time, share of the full prefill"
    head = ["media", "method", *(f"ratio {ratio:g}" for ratio in RATIOS), share, "measured"]
    rows = []
    for (kind, method), records in speed_records().items():
        some = [records[ratio] for ratio in RATIOS]
        shares = sorted(100 * r["reduce_overhead"] for r in some)
        figure = Figure("", method, [], some[0]["environment"])
        rows.append(
            [
                *(kind, method, *(f"{r['speedup']:.1f} ×" for r in some)),
                " to ".join(dict.fromkeys(f"{n:.1f}" for n in (shares[0], shares[-1]))) + " %",
                figure.mark.partition(", ")[2].rstrip(")"),
            ]
        )
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
    rows = figures()
    put(ROOT / "README.md", "## How fast, and how exact", readme_table(rows))
    put(ROOT / "docs" / "evaluation.md", "### Speed", speed_table())
    for figure in rows:
        print(f"{figure.text}: {outdated(figure) or 'current'}")


if __name__ == "__main__":
    main()
