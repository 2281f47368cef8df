"""The summary page: every method over all ratios. docs/evaluation.md shows rows of it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks.accuracy.store import Results
from benchmarks.accuracy.tables import BASELINES, NONE, cell, kept, name, spread, table
from tokencomp.evaluation.settings import FULL

MAIN = "tiny-qwen3-vl"
INTERVALS = ("random",)  # and the default
TRAINED = ("selector",)

Method = tuple[str, str]
"""Reducer, and its options as JSON."""


def methods(results: Results) -> dict[Method, dict[float, str]]:
    """Labels by method and ratio: the best over all ratios first, baselines last."""
    labels: dict[Method, dict[float, str]] = {}
    for label, setting in results.settings.items():
        if setting["ratio"]:
            method = (setting["reducer"], json.dumps(setting["options"], sort_keys=True))
            labels.setdefault(method, {})[setting["ratio"]] = label

    def rank(method: Method) -> tuple[int, int]:
        families = results.learned
        correct = sum(sum(results.scores(k, "both", families)) for k in labels[method].values())
        return BASELINES.index(method[0]) + 1 if method[0] in BASELINES else 0, -correct

    return {method: labels[method] for method in sorted(labels, key=rank)}


def line(results: Results, labels: dict[float, str]) -> list[str]:
    """One method's name and its retention over the learned families at every ratio."""
    setting = results.settings[next(iter(labels.values()))]
    method = name(setting, results.default)
    many = next((len(results.seeds[k]) for k in labels.values() if k in results.seeds), 0)
    interval = setting["reducer"] in INTERVALS or method.startswith("**")
    cells = [
        cell(kept(results, labels[r], "both"), interval) + spread(results, labels[r])
        if r in labels
        else NONE
        for r in results.ratios
    ]
    note = " (trained)" if setting["reducer"] in TRAINED else ""
    return [method + (f" ({many} seeds)" if many else note), *cells]


HEAD = """# Accuracy kept, every method at every ratio

Made by `python -m benchmarks.accuracy.report`. Accuracy with compression divided by the accuracy
without it, on the same questions of the learned families, images and videos together. Brackets:
paired 95 % intervals; of `random`, which is the mean of its seeds, also its worst and best seed.
[Methods](METHODS.md). [The full tables](README.md)."""


def summary(every: Sequence[Results]) -> str:
    """The page: all methods on the main model; the default and the baselines on the others."""
    main = next(one for one in every if one.manifest["model"] == MAIN)
    others = [one for one in every if one is not main]
    head = [f"ratio {r:g}" for r in main.ratios]
    body = [line(main, labels) for labels in methods(main).values()]
    flops = [main.settings[f"{main.default}-{r:g}"]["flops"] for r in main.ratios]
    full = main.settings[FULL]["flops"]
    body.append(["FLOPs left (LLM, text included)", *(f"{f / full:.0%}" for f in flops)])
    short = []
    for one in others:
        for (reducer, options), labels in methods(one).items():
            if options == "{}" and reducer in (one.default, *BASELINES):
                short.append([one.manifest["model"], *line(one, labels)])
    families = [
        f"{one.manifest['model']}: {', '.join(one.learned)} "
        f"({len(one.select('both', one.learned))} of {len(one.answers.questions)} items)"
        for one in every
    ]
    parts = [
        HEAD,
        f"## {MAIN}",
        table(["method", *head], body),
        "## Other embedded models",
        table(["model", "method", *head], short),
        "## Learned families",
        f"{'; '.join(families)}.",
    ]
    return "\n\n".join(parts) + "\n"
