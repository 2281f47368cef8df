"""Choose the default reducer on the validation split, and write down why.

    python benchmarks/accuracy/choose.py            # asks every candidate → CHOICE.md, choice.json
    python benchmarks/accuracy/choose.py --report   # from results that are there

The rule, written before these results (but after a look at earlier checkpoints of the model, which
narrowed the candidates): for every candidate, retention at each ratio, model and kind (images,
videos) over the question families the model has learned (`Results.learned`); its score is the mean.
Candidates whose paired 95 % interval of the difference to the best includes 0 are tied with it; of
those, the one with the best worst case (smallest retention anywhere) wins. Reducers that need
training take part in the benchmark, not here: a default must work on any model.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import numpy as np
import torch
from report import Results
from run import HERE, RATIOS, answer_all

from tokencomp.evaluation.settings import Setting
from tokencomp.zoo import available_models
from tokencomp.zoo.questions import FAMILIES

CANDIDATES: list[tuple[str, dict[str, Any]]] = [
    ("condiv", {"power": 0.25}),
    ("condiv", {"power": 0.5}),
    ("condiv", {"power": 0.5, "centred": True}),
    ("condiv", {"power": 1.0}),
    ("condiv", {"power": 1.0, "centred": True}),
    ("condiv", {"power": 2.0}),
    ("condiv", {"power": 4.0}),
    ("condiv", {"power": 1.0, "merge_rest": 0.8}),
    ("condiv", {"power": 0.0, "centred": True}),
    ("condiv", {"power": 0.5, "signal": "norm"}),
    ("condiv", {"power": 0.5, "signal": "novelty"}),
    ("cdpruner", {"relevance": "attention"}),
    ("divprune", {}),
    ("merge", {}),
    ("aim", {}),
    ("prune", {}),
    ("random", {}),
    ("uniform", {}),
]
DRAWS = 4000


def cells(results: list[Results], name: str, options: dict[str, Any]) -> list[np.ndarray]:
    """(2, items) arrays of compressed and full scores, one per model, ratio and kind."""
    found = []
    for one, ratio, kind in itertools.product(results, RATIOS, ("images", "videos")):
        label = Setting(name, ratio, options).label
        found.append(
            np.array([one.scores(label, kind, one.learned), one.scores("full", kind, one.learned)])
        )
    return found


def score(parts: list[np.ndarray], draws: list[np.ndarray]) -> np.ndarray:
    """Mean retention over the cells, per bootstrap draw; draw 0 is the sample itself."""
    means = []
    for part, draw in zip(parts, draws, strict=True):
        mine, full = part[0][draw].sum(1), part[1][draw].sum(1)
        means.append(mine / np.maximum(full, 1))
    return np.mean(means, axis=0)


def rank(results: list[Results]) -> list[dict[str, Any]]:
    """Candidates by score, with the interval of the difference to the best."""
    rng, resamples = np.random.default_rng(0), []
    all_cells = [cells(results, *c) for c in CANDIDATES]
    shared: dict[tuple[int, int], np.ndarray] = {}
    for i, part in enumerate(all_cells[0]):
        # the same items are drawn at every ratio
        key = (i // (2 * len(RATIOS)), i % 2)
        if key not in shared:
            n = part.shape[1]
            shared[key] = np.vstack([np.arange(n), rng.integers(n, size=(DRAWS, n))])
        resamples.append(shared[key])
    scores = [score(parts, resamples) for parts in all_cells]
    best = max(scores, key=lambda s: s[0])
    rows = []
    for (name, options), parts, mine in zip(CANDIDATES, all_cells, scores, strict=True):
        low, high = np.quantile((mine - best)[1:], [0.025, 0.975])
        each = [p[0].sum() / max(p[1].sum(), 1) for p in parts]
        rows.append(
            {
                "reducer": name,
                "options": options,
                "score": float(mine[0]),
                "difference": [float(low), float(high)],
                "tied": bool(high >= 0),
                "worst": float(min(each)),
                "cells": [float(e) for e in each],
            }
        )
    return sorted(rows, key=lambda r: -r["score"])


def write_choice(rows: list[dict[str, Any]], results: list[Results]) -> None:
    chosen = max((r for r in rows if r["tied"]), key=lambda r: (r["worst"], r["score"]))
    keys = list(itertools.product([r.manifest["model"] for r in results], RATIOS, ("img", "vid")))
    (HERE / "choice.json").write_text(
        json.dumps({"chosen": chosen, "cells": keys, "candidates": rows}, indent=1) + "\n"
    )
    made = [f"{r.manifest['model']}: {r.manifest['items']} items" for r in results]
    columns = [f"{kind} {ratio:g}" for ratio, kind in itertools.product(RATIOS, ("img", "vid"))]
    head = ["candidate", "score", "difference to best (95 %)", "worst", *columns]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        options = ", ".join(f"{k}={v}" for k, v in r["options"].items())
        name = f"{r['reducer']} {options}".strip()
        mean = np.array(r["cells"]).reshape(len(results), -1).mean(0)
        low, high = r["difference"]
        line = [
            f"**{name}**" if r is chosen else name,
            f"{r['score']:.1%}",
            f"[{low:+.1%}, {high:+.1%}]" + (" tied" if r["tied"] else ""),
            f"{r['worst']:.1%}",
            *(f"{v:.1%}" for v in mean),
        ]
        table.append("| " + " | ".join(line) + " |")
    text = "\n\n".join(
        [
            "# Choice of the default reducer",
            "Made by `python benchmarks/accuracy/choose.py` on ShapesQA's validation split "
            f"({'; '.join(made)}). Columns: retention of images and videos per ratio.",
            __doc__.split("\n\n")[2].replace("\n", " "),
            f"Chosen: **{chosen['reducer']}** with {chosen['options'] or 'its default options'}.",
            "\n".join(table),
        ]
    )
    (HERE / "CHOICE.md").write_text(text + "\n")
    print(f"chosen: {chosen['reducer']} {chosen['options']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=available_models())
    parser.add_argument("--per-family", type=int, default=40)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only rebuild the choice")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wanted = [Setting(), *(Setting(n, r, o) for (n, o), r in itertools.product(CANDIDATES, RATIOS))]
    for name in () if args.report else args.models:
        answer_all(name, "validation", wanted, args, HERE / "results")
    results = [Results.read(HERE / "results" / name, "validation") for name in args.models]
    write_choice(rank(results), results)


if __name__ == "__main__":
    main()
