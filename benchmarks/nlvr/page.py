"""The page about NLVR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy.tables import table

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "results.json", FOLDER / "README.md"
NAMES = {"dev": "development", "test": "test, published", "hidden": "test, unpublished"}


def page(stored: Mapping[str, Any]) -> str:
    """The page of stored results."""
    training, splits = stored["training"], stored["splits"]
    learnt = all(s["low"] > s["majority"] for s in splits.values())
    steps = ", ".join(f"{count} of `{name}`" for name, count in training["stages"].items())
    rows = [
        [
            NAMES[name], f"{s['examples']:,}", str(s["sentences"]), f"{100 * s['accuracy']:.1f}",
            f"{100 * s['low']:.1f} to {100 * s['high']:.1f}", f"{100 * s['majority']:.1f}",
        ]
        for name, s in splits.items()
    ]  # fmt: skip
    scores = ", ".join(f"{name} {value} %" for name, value in training["training_scores"].items())
    return HEAD.format(
        parameters=training["parameters"] / 1e6, count=training["training_examples"], steps=steps,
        minutes=round(training["seconds"] / 60), scores=scores,
        table=table(["split", "examples", "sentences", "right", "95 %", "majority"], rows),
        reading=LEARNT if learnt else NOT_LEARNT,
    )  # fmt: skip


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

- Steps: {steps}. {minutes} minutes on two cores that other programs used too.
- Right answers in the latest training batches: {scores}.

{table}

"Right" is the full model without compression: which of "yes" and "no" has the larger logit after
the sentence, for the first order of the boxes. Intervals draw sentences, since examples share
them; "majority" is the share of "true".

{reading}"""
NOT_LEARNT = """**A tiny model does not learn NLVR in this time.** It is not significantly above
the majority class on every split, so its answers cannot tell methods apart, and no method was
asked.
"""
LEARNT = """The full model is above the majority class on every split.
"""
