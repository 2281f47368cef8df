"""The page about NLVR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy.tables import table
from benchmarks.publishing import provenance

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "results.json", FOLDER / "README.md"
NAMES = {"dev": "development", "test": "test, published", "hidden": "test, unpublished"}


def page(stored: Mapping[str, Any]) -> str:
    """The page of stored results."""
    training, splits = stored["training"], stored["splits"]
    steps = ", ".join(f"{count:,} of `{name}`" for name, count in training["stages"].items())
    rows = [
        [
            NAMES[name], f"{s['examples']:,}", str(s["sentences"]), f"{100 * s['accuracy']:.1f}",
            f"{100 * s['low']:.1f} to {100 * s['high']:.1f}", f"{100 * s['majority']:.1f}",
        ]
        for name, s in splits.items()
    ]  # fmt: skip
    scores = "; ".join(f"{name} {value} %" for name, value in training["training_scores"].items())
    return HEAD.format(
        parameters=training["parameters"] / 1e6, count=training["training_examples"], steps=steps,
        minutes=round(training["seconds"] / 60), scores=scores,
        table=table(["split", "examples", "sentences", "right", "95 %", "majority"], rows),
        reading=_methods(stored["methods"]) if "methods" in stored else NOT_LEARNT,
        provenance=provenance(training),
    )  # fmt: skip


def _methods(found: Mapping[str, Any]) -> str:
    """What every method loses, the least at the highest ratio first."""
    ratios = sorted({one["ratio"] for one in found["asked"]})
    by_method: dict[str, dict[float, Mapping[str, Any]]] = {}
    for one in found["asked"]:
        by_method.setdefault(one["label"].replace(f"-{one['ratio']}", ""), {})[one["ratio"]] = one
    order = sorted(by_method, key=lambda name: -by_method[name][ratios[-1]]["accuracy"])
    equal: dict[tuple[str, ...], list[str]] = {}
    for name in order:
        equal.setdefault(tuple(_cell(by_method[name][ratio]) for ratio in ratios), []).append(name)
    rows = [[", ".join(names), *cells] for cells, names in equal.items()]
    head = ["method", *(f"ratio {ratio:g}" for ratio in ratios)]
    refused = ", ".join(sorted({label.partition("-")[0] for label in found["refused"]}))
    return LEARNT.format(
        count=found["examples"], full=100 * found["full"], table=table(head, rows), refused=refused
    )


def _cell(one: Mapping[str, Any]) -> str:
    low, high = (100 * one[f"difference_{name}"] for name in ("low", "high"))
    return f"{100 * one['accuracy']:.1f} ({low:+.1f} to {high:+.1f})"


HEAD = """# NLVR

True or false sentences of people about drawn pictures (Suhr et al., ACL 2017; lil-lab/nlvr,
CC-BY-4.0; nothing of it is copied here). Can a tiny model learn them, so that the methods can be
compared on a benchmark that others made?

```bash
python -m benchmarks.nlvr train FOLDER       # goes on where it stopped
python -m benchmarks.nlvr evaluate FOLDER    # → results.json, README.md
```

`tiny-qwen3-vl` ({parameters:.1f} million parameters), with a token for each of NLVR's words, was
trained on drawn scenes with generated sentences and on {count:,} examples of the training split,
all whose labels were at hand.

- Steps: {steps}. {minutes} minutes on one core, of two that other programs used too.
- Right answers in the latest training batches: {scores}.

{table}

"Right" is the full model without compression: which of "yes" and "no" has the larger logit after
the sentence, for the first order of the boxes. Intervals draw sentences, since examples share
them; "majority" is the share of "true".

{reading}
**The training was lengthened after a first result on the same splits**: 131 steps (2026-11-30,
9647772c) were not above the majority class there. So the accuracy of the full model is not that of
unseen splits; which methods lose how much was asked once, after the longer training.

Neither the weights nor the answers are stored: training takes {minutes} minutes, and its result
depends on the machine. So there are no intervals between two methods, and the table cannot be
computed again from this repository.

Measured: {provenance}.
"""
NOT_LEARNT = """**A tiny model does not learn NLVR in this time.** It is not significantly above
the majority class on every split, so its answers cannot tell methods apart, and no method was
asked.
"""
LEARNT = """The full model is above the majority class on every split. Every method at its default
options was asked the {count:,} examples of both test splits, of which the full model answers
{full:.1f} % right. In brackets: the 95 % interval of the difference to the full model, in points.
Methods with the same numbers share a row.

{table}

Nothing was chosen on NLVR. `downscale` has smaller pictures of as many tokens, in sizes that the
model was not trained on. Not asked, since they need trained weights or keep a fixed number of
tokens: {refused}.
"""
