"""Choose the default reducer on the validation split, and write down why.

python benchmarks/accuracy/choose.py            # asks what was not asked yet → CHOICE.md
python benchmarks/accuracy/choose.py --report   # from results that are there
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from ranking import Candidate, answered, keys, rank, settings
from report import families_told, home, made_by, read_all
from results import KINDS, RESULTS, Results
from run import RATIOS, answer_all
from tables import table

from tokencomp import make_reducer
from tokencomp.evaluation.settings import Setting
from tokencomp.patching import DEFAULT_REDUCER
from tokencomp.weights import replace_file, write_json
from tokencomp.zoo import available_models
from tokencomp.zoo.questions import FAMILIES

RULE = """The rule, written before these results (but after a look at earlier checkpoints of the
model, which narrowed the candidates): for every candidate, retention at each ratio, model and kind
(images, videos) over the question families the model has learned (`results.learned_families`); its
score is the mean. Candidates whose paired 95 % interval of the difference to the best includes 0
are tied with it; of those, the one with the best worst case (smallest retention anywhere) wins.
Where that is equal too, the present default stays, and then the better score wins; this was added
when power=0.5 and power=1.0 came out equal (scores 0.03 points apart): a default is not changed for
nothing. Reducers that need training take part in the benchmark, not here: a default must work on
any model. condiv with power=auto or signal=vit_attention became candidates after the others had
been measured."""

CANDIDATES: list[Candidate] = [
    ("condiv", {"power": 0.25}),
    ("condiv", {"power": 0.5}),
    ("condiv", {"power": 0.5, "centred": True}),
    ("condiv", {"power": 1.0}),
    ("condiv", {"power": 1.0, "centred": True}),
    ("condiv", {"power": 2.0}),
    ("condiv", {"power": 4.0}),
    ("condiv", {"power": "auto"}),
    ("condiv", {"power": 1.0, "merge_rest": 0.8}),
    ("condiv", {"power": 0.0, "centred": True}),
    ("condiv", {"power": 0.5, "signal": "norm"}),
    ("condiv", {"power": 0.5, "signal": "novelty"}),
    ("condiv", {"power": 0.5, "signal": "vit_attention"}),
    ("condiv", {"power": 1.0, "signal": "vit_attention"}),
    ("cdpruner", {"relevance": "attention"}),
    ("divprune", {}),
    ("merge", {}),
    ("aim", {}),
    ("prune", {}),
    ("random", {}),
    ("uniform", {}),
]
ASKED = (
    "attribute", "existence", "count", "small_object", "needle", "video_existence", "action_count",
)  # fmt: skip


def title(candidate: Candidate) -> str:
    return f"{candidate[0]} {', '.join(f'{k}={v}' for k, v in candidate[1].items())}".strip()


def choice_table(rows: list[dict[str, Any]], chosen: dict[str, Any], results: list[Results]) -> str:
    columns = list(itertools.product(RATIOS, KINDS))
    cells = [(ratio, kind) for _, ratio, kind in keys(results)]
    head = ["candidate", "score", "difference to best (95 %)", "worst"]
    body = []
    for r in rows:
        name, (low, high) = title((r["reducer"], r["options"])), r["difference"]
        body.append(
            [
                f"**{name}**" if r is chosen else name,
                f"{r['score']:.1%}",
                f"[{low:+.1%}, {high:+.1%}]" + (" tied" if r["tied"] else ""),
                f"{r['worst']:.1%}",
                *(mean_of(r["cells"], cells, column) for column in columns),
            ]
        )
    return table([*head, *(f"{kind} {ratio:g}" for ratio, kind in columns)], body)


def mean_of(values: list[float], cells: list[tuple[float, str]], column: tuple[float, str]) -> str:
    mine = [v for v, c in zip(values, cells, strict=True) if c == column]
    return f"{sum(mine) / len(mine):.1%}" if mine else "–"


def write_choice(results: list[Results], folder: Path) -> dict[str, Any]:
    """CHOICE.md and choice.json; returns the chosen row."""
    ready = [c for c in CANDIDATES if answered(results, c)]
    rows = rank(results, ready)
    chosen = max((r for r in rows if r["tied"]), key=preference)
    cells = [[results[i].manifest["model"], ratio, kind] for i, ratio, kind in keys(results)]
    data = {"chosen": chosen, "cells": cells, "candidates": rows}
    write_json(folder / "choice.json", data)
    waiting = [title(c) for c in CANDIDATES if c not in ready]
    parts = [
        "# Choice of the default reducer",
        "Made by `python benchmarks/accuracy/choose.py` on ShapesQA's validation split, retention "
        "of images and videos per ratio, mean over the models.",
        RULE.replace("\n", " "),
        f"Chosen: **{chosen['reducer']}** with {chosen['options'] or 'its default options'}.",
        *([f"Not asked yet: {'; '.join(waiting)}."] if waiting else []),
        choice_table(rows, chosen, results),
    ]
    for one in results:
        m = one.manifest
        parts += [f"## {m['model']}", f"{m['items']} items. {families_told(one)}", made_by(one)]
    text = "\n\n".join(parts) + "\n"
    replace_file(folder / "CHOICE.md", lambda part: part.write_text(text))
    return chosen


def preference(row: dict[str, Any]) -> tuple[float, bool, float]:
    """What decides between tied candidates: worst case, being the default, score."""
    reducer = make_reducer(row["reducer"], **row["options"])
    return row["worst"], reducer == make_reducer(DEFAULT_REDUCER), row["score"]


def missing(folder: Path) -> list[Setting]:
    """The full model, by whose answers the model is known again, and what was not asked yet."""
    there = (folder / "validation.json").exists()
    known = Results.read(folder, "validation").settings if there else {}
    wanted = [s for c in CANDIDATES for s in settings(c) if s.label not in known]
    return [Setting(), *wanted] if wanted else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=available_models())
    parser.add_argument("--per-family", type=int, default=20)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(ASKED))
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only rebuild the choice")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in () if args.report else args.models:
        wanted = missing(args.out / name)
        if wanted:
            answer_all(name, "validation", wanted, args)
    chosen = write_choice(read_all(args.out, "validation"), home(args.out))
    print(f"chosen: {title((chosen['reducer'], chosen['options']))}")


if __name__ == "__main__":
    main()
