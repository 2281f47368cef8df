"""The accuracy tables of the project's README, as `report.py --readme` prints them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from results import Results
from tables import BASELINES, NONE, cell, kept, name, table

from tokencomp.evaluation.settings import FULL

MAIN = "tiny-qwen2-vl"
INTERVALS = ("random",)  # and the default
TRAINED = ("selector",)

Way = tuple[str, str]  # reducer, options as JSON


def ways(results: Results) -> dict[Way, dict[float, str]]:
    """Labels by method and ratio: the best of all ratios first, baselines last."""
    found: dict[Way, dict[float, str]] = {}
    for label, one in results.settings.items():
        if one["ratio"]:
            way = (one["reducer"], json.dumps(one["options"], sort_keys=True))
            found.setdefault(way, {})[one["ratio"]] = label

    def rank(way: Way) -> tuple[int, int]:
        right = sum(sum(results.scores(k, "both", results.learned)) for k in found[way].values())
        return BASELINES.index(way[0]) + 1 if way[0] in BASELINES else 0, -right

    return {way: found[way] for way in sorted(found, key=rank)}


def line(results: Results, labels: dict[float, str], default: str) -> list[str]:
    """One method's name and its retention over the learned families at every ratio."""
    one = results.settings[next(iter(labels.values()))]
    method = name(one, default)
    interval = one["reducer"] in INTERVALS or method.startswith("**")
    cells = [
        cell(kept(results, labels[r], "both"), interval) if r in labels else NONE
        for r in results.ratios
    ]
    return [method + (" (trained)" if one["reducer"] in TRAINED else ""), *cells]


def readme(found: Sequence[Results], default: str) -> str:
    """All methods on the main model; the default and the baselines on the others."""
    main = next(one for one in found if one.manifest["model"] == MAIN)
    others = [one for one in found if one is not main]
    head = [f"ratio {r:g}" for r in main.ratios]
    body = [line(main, labels, default) for labels in ways(main).values()]
    flops = [main.settings[f"{default}-{r:g}"]["flops"] for r in main.ratios]
    full = main.settings[FULL]["flops"]
    body.append(["FLOPs left (LLM, text included)", *(f"{f / full:.0%}" for f in flops)])
    short = []
    for one in others:
        for (reducer, options), labels in ways(one).items():
            if options == "{}" and reducer in (default, *BASELINES):
                short.append([one.manifest["model"], *line(one, labels, default)])
    told = [
        f"{one.manifest['model']}: {', '.join(one.learned)} "
        f"({len(one.of('both', one.learned))} of {len(one.rows)} items)"
        for one in found
    ]
    return "\n\n".join(
        [
            table(["method", *head], body),
            table(["model", "method", *head], short),
            f"Families: {'; '.join(told)}.",
        ]
    )
