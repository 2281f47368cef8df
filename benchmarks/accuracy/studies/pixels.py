"""How many pixels an image may lose before compression, on validation questions.

    python -m benchmarks.accuracy.studies.pixels            # pixels.json and pixels.md
    python -m benchmarks.accuracy.studies.pixels --report   # only the page

The processor bounds the tokens of an image (`--image-max-tokens`), and the default method then
keeps a budget of them. At one budget all bounds cost the decoder the same, and lower ones cost the
vision tower less. The first bound in the table is the budget itself: fewer pixels alone. The column
`tower_ratio="auto"` has all pixels, and drops patches before the tower instead.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import publishing
from benchmarks.experiment import Experiment
from tokencomp import zoo
from tokencomp.evaluation.metrics import difference
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.pixels import limit_image_tokens
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items
from tokencomp.zoo.shapesqa.questions import IMAGE_FAMILIES

MODEL, PER_FAMILY = "tiny-qwen3-vl-hard", 60
KINDS = {"scenes": IMAGE_FAMILIES, "words": ("reading",)}
TOKENS, BUDGETS = 64, (4, 9, 16)
BOUNDS = (4, 9, 16, 25, 36, 49, TOKENS)
TOWER = "tower"


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per kind of question, budget and bound: the answers as 0 and 1, in one order."""
    model, processor = zoo.load(MODEL)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, families in KINDS.items():
            examples = shapesqa(items("validation", PER_FAMILY, families), folder)
            for bound in BOUNDS:
                settings = [Setting("auto", budget=b) for b in BUDGETS if b < bound]
                settings += [Setting()] * (bound in (*BUDGETS, TOKENS))
                if bound == TOKENS:
                    settings += [Setting("auto", budget=b, tower_ratio="auto") for b in BUDGETS]
                limited = limit_image_tokens(processor, bound)
                for setting, run in sweep(model, limited, examples, settings).items():
                    column = TOWER if setting.tower_ratio else bound
                    budget = bound if setting.off else setting.budget
                    right = [int(r["correct"]) for r in run.records]
                    rows.append({"kind": kind, "budget": budget, "bound": column, "right": right})
                    print(kind, budget, column, sum(right) / len(right), flush=True)
    yield {"rows": rows}


def page(report: dict[str, Any]) -> str:
    """Accuracy by budget and bound, with the interval of what a bound changes."""
    parts = [
        "# How many pixels does a budget need?",
        "`python -m benchmarks.accuracy.studies.pixels`",
    ]
    for kind in KINDS:
        rows = {(r["budget"], r["bound"]): r["right"] for r in report["rows"] if r["kind"] == kind}
        whole = rows[TOKENS, TOKENS]
        head = ("budget", *(f"≤ {bound} tokens" for bound in BOUNDS), '`tower_ratio="auto"`')
        columns = (*BOUNDS, TOWER)
        body = [[f"{b}", *(_cell(rows, b, column) for column in columns)] for b in BUDGETS]
        title = (
            f"## {kind.capitalize()}: {len(whole)} questions, {_share(whole)} without compression"
        )
        parts += [title, publishing.table(head, body)]
    parts.append(
        f"{MODEL} on validation questions of ShapesQA, whose images have {TOKENS} tokens. The "
        "processor scales an image down to at most the tokens of a column, and the default method "
        "keeps the budget of them; where both are equal, nothing is compressed. In brackets the "
        f"95 % interval of the difference from ≤ {TOKENS} tokens, in points. [All benchmark "
        "pages](../README.md)."
    )
    return "\n\n".join(parts)


def _cell(rows: dict[tuple[int, Any], list[int]], budget: int, bound: Any) -> str:
    if (budget, bound) not in rows:
        return ""
    right = rows[budget, bound]
    if bound == TOKENS:
        return _share(right)
    gap = difference(right, rows[budget, TOKENS])
    return f"{_share(right)} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def _share(right: list[int]) -> str:
    return f"{sum(right) / len(right):.1%}"


EXPERIMENT = Experiment("accuracy/pixels", measure, page)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
