"""First accuracy of the newer methods on validation questions: the page of stored answers.

    python -m benchmarks.accuracy.studies.newer    # newer.md

The answers are those of `benchmarks.accuracy.run --split validation` with --out newer (images) or
newer-videos; the commands are on the page.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import publishing
from benchmarks.accuracy.store import ACCURACY, Results
from benchmarks.accuracy.tables import EARLIER
from benchmarks.stored import NOTE
from tokencomp.evaluation.metrics import difference

MODEL = "tiny-qwen3-vl"
SETS = {"newer": ("images", "kcenter"), "newer-videos": ("videos", "auto")}
"""Folder: what the questions are about, and the label of the default."""
HEAD = """# First accuracy of the newer methods

Made by `python -m benchmarks.accuracy.studies.newer`. The tiny Qwen3-VL on validation questions:
accuracy kept, and the paired difference from the default in points (95 % by bootstrap).
The default was chosen on these questions, which favours it. `random` is the mean of its seeds."""


def method(results: Results, label: str) -> str:
    """The reducer with its options, as Python has them."""
    setting = results.settings[label]
    options = "".join(f", {k}={v!r}" for k, v in sorted(setting["options"].items()))
    earlier = " (earlier rule)" if setting.get("method") in EARLIER else ""
    seeds = f" ({len(results.seeds[label])} seeds)" if label in results.seeds else ""
    return f"`{setting['reducer']}{options}`{seeds}{earlier}"


def rows(results: Results, default: str) -> list[list[str]]:
    """The best at the lowest ratio first."""
    full = sum(results.scores("full"))
    found: dict[str, dict[float, tuple[float, str]]] = {}
    for label, setting in results.settings.items():
        if not setting["ratio"]:
            continue
        scores = results.scores(label)
        text = f"{sum(scores) / full:.1%}"
        if setting["reducer"] != default or setting["options"]:
            gap = difference(scores, results.scores(f"{default}-{setting['ratio']:g}"))
            value, low, high = (100 * x for x in (gap.value, gap.low, gap.high))
            text += f", {value:+.1f} [{low:+.1f}, {high:+.1f}]"
        found.setdefault(method(results, label), {})[setting["ratio"]] = (sum(scores), text)
    order = sorted(found, key=lambda name: -found[name][results.ratios[0]][0])
    return [[name, *(found[name][r][1] for r in results.ratios)] for name in order]


def page() -> str:
    """Both tables, and the commands that answered the questions."""
    parts = [HEAD, NOTE]
    for folder, (kind, default) in SETS.items():
        results = Results.read(ACCURACY / folder / MODEL, "validation").averaged()
        parts += [
            f"## {len(results.answers.questions)} questions about {kind}: "
            + ", ".join(results.families),
            publishing.table(
                ("method", *(f"ratio {r:g}" for r in results.ratios)), rows(results, default)
            ),
            "\n".join(f"- {publishing.provenance(run)}" for run in results.manifest["runs"]),
        ]
    return "\n\n".join(parts) + "\n"


def main(out: Path = ACCURACY / "newer.md") -> None:
    out.write_text(page())


if __name__ == "__main__":
    main()
