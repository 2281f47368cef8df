"""The page about NLVR, with intervals from the stored answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.accuracy.packed import unpack
from benchmarks.publishing import table

NAMES = {"dev": "development", "test": "test, published", "hidden": "test, unpublished"}
ASKED = ("test", "hidden")
DEFAULT = "auto"
RESAMPLES = 10_000


class Draws:
    """Bootstrap samples of sentences, the same for every statistic.

    Examples of one sentence are drawn together, since a model that misreads the sentence answers
    all of them wrong.

    Parameters
    ----------
    sentences
        Number of the sentence of every example.
    """

    def __init__(self, sentences: Sequence[int]) -> None:
        self.sentences = np.asarray(sentences)
        count = int(self.sentences.max()) + 1
        self.sizes = np.bincount(self.sentences, minlength=count)
        drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
        self.times = np.stack([np.bincount(row, minlength=count) for row in drawn])

    def interval(self, values: np.ndarray) -> tuple[float, float, float]:
        """Mean of one value per example, with its 95 % bootstrap interval."""
        sums = np.bincount(self.sentences, values, minlength=len(self.sizes))
        means = (self.times @ sums) / (self.times @ self.sizes)
        low, high = np.quantile(means, [0.025, 0.975])
        return float(values.mean()), float(low), float(high)


def page(stored: Mapping[str, Any]) -> str:
    """Markdown of stored answers."""
    training, splits = stored["training"], stored["splits"]
    steps = ", ".join(f"{count:,} of `{name}`" for name, count in training["stages"].items())
    scores = "; ".join(f"{name} {value} %" for name, value in training["training_scores"].items())
    head = ["split", "examples", "sentences", "right", "95 %", "majority"]
    return HEAD.format(
        parameters=training["parameters"] / 1e6, count=training["training_examples"], steps=steps,
        minutes=round(training["seconds"] / 60), scores=scores, commit=training["commit"][:8],
        date=training["date"][:10],
        table=table(head, [_split(NAMES[name], split) for name, split in splits.items()]),
        reading=_methods(stored) if "methods" in stored else "",
    )  # fmt: skip


def _split(name: str, split: Mapping[str, Any]) -> list[str]:
    bits = np.array(unpack(split["right"], split["examples"]), float)
    mean, low, high = Draws(split["sentences"]).interval(bits)
    majority = max(split["true"], split["examples"] - split["true"]) / split["examples"]
    return [
        name, f"{split['examples']:,}", str(max(split["sentences"]) + 1), f"{100 * mean:.1f}",
        f"{100 * low:.1f} to {100 * high:.1f}", f"{100 * majority:.1f}",
    ]  # fmt: skip


def _methods(stored: Mapping[str, Any]) -> str:
    """What every method keeps, best first at the highest ratio, against full and default."""
    splits = [stored["splits"][name] for name in ASKED]
    full = np.concatenate([unpack(s["right"], s["examples"]) for s in splits]).astype(float)
    second = max(splits[0]["sentences"]) + 1
    draws = Draws([*splits[0]["sentences"], *(second + n for n in splits[1]["sentences"])])
    ratios = sorted({one["ratio"] for one in stored["methods"]})
    bits: dict[str, dict[float, np.ndarray]] = {}
    for one in stored["methods"]:
        name = one["label"].replace(f"-{one['ratio']}", "")
        values = np.array(unpack(one["right"], len(full)), float)
        bits.setdefault(name, {})[one["ratio"]] = values
    equal: dict[tuple[bytes, ...], list[str]] = {}
    for name in sorted(bits, key=lambda name: -bits[name][ratios[-1]].mean()):
        equal.setdefault(tuple(bits[name][r].tobytes() for r in ratios), []).append(name)
    default, groups = bits[DEFAULT], [*equal.values()]
    against = [
        {r: draws.interval(bits[names[0]][r] - default[r]) for r in ratios} for names in groups
    ]
    rows = []
    for names, of_default in zip(groups, against, strict=True):
        cells = []
        for r in ratios:
            values = bits[names[0]][r]
            cells += [
                f"{100 * values.mean():.1f}", _bracket(draws.interval(values - full)),
                "" if DEFAULT in names else _bracket(of_default[r]),
            ]  # fmt: skip
        rows.append([", ".join(names), *cells])
    head = ["method"]
    for r in ratios:
        head += [f"right, {r:g}", "− full", f"− {DEFAULT}"]
    others = f"of the {len(groups) - 1} other sets"
    counts = [
        f"At {r:g}, {sum(one[r][2] < 0 for one in against)} {others} have fewer right answers than "
        f"the default and {sum(one[r][1] > 0 for one in against)} more, beyond their intervals."
        for r in ratios
    ]
    refused = ", ".join(sorted({label.partition("-")[0] for label in stored["refused"]}))
    return METHODS.format(
        count=len(full), full=100 * full.mean(), table=table(head, rows), refused=refused,
        methods=len(bits), different=len(groups), counts=" ".join(counts),
    )  # fmt: skip


def _bracket(found: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in found)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


HEAD = """# NLVR

True or false sentences of people about drawn pictures (Suhr et al., ACL 2017; lil-lab/nlvr,
CC-BY-4.0; nothing of it is copied here). Can a tiny model learn them, so that the methods can be
compared on a benchmark that others made?

```bash
python -m recipes.nlvr.build FOLDER    # trains; goes on where it stopped
python -m benchmarks.nlvr FOLDER       # asks → results.json, README.md
```

`tiny-qwen3-vl` ({parameters:.1f} million parameters), with a token for each of NLVR's words, was
trained on drawn scenes with generated sentences and on {count:,} examples of the training split,
all whose labels were at hand.

- Steps: {steps}. {minutes} minutes on one core, of two that other programs used too ({commit},
  {date}).
- Right answers in the latest training batches: {scores}.

{table}

"Right" is the full model without compression: which of "yes" and "no" has the larger logit after
the sentence, for the first order of the boxes. Intervals draw sentences, since examples share
them; "majority" is the share of the more frequent label.

{reading}
**The training was lengthened after a first result on the same splits**: 131 steps (2026-11-30,
9647772c) were not above the majority class there. So the accuracy of the full model is not one of
unseen splits. Which methods lose how much was asked of a longer training (2026-11-30), whose
answers and weights were not stored, and again of this one, the same recipe, with stored answers.
"""
METHODS = """Every method at its default options was asked the {count:,} examples of both test
splits. The full model answers {full:.1f} % right. In brackets: 95 % intervals of the
differences to the full model and to the default, in points. Methods that answer every example alike
share a row: on single pictures, {methods} methods give {different} different sets of answers.
{counts}

{table}

Nothing was chosen on NLVR. `downscale` has smaller pictures of as many tokens, in sizes that the
model was not trained on. Not asked, since they need trained weights or keep a fixed number of
tokens: {refused}. The weights are not stored: the result of a training depends on the machine.
"""
