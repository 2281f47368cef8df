"""The selector of features, which servers can run, against what it competes with.

    tokencomp train selector --input features --model tiny-qwen2-vl --output FOLDER ...
    python -m benchmarks.accuracy.studies.selector_features --weights FOLDER

writes selector_features.json and selector_features.md. Rivals are the selector that lies beside the
model and reads attention, the library's default, the default of servers, and the baselines. The
sets are those of the selector; `--sets` runs some only, the others stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.accuracy.studies.selector import SETS, source
from benchmarks.accuracy.studies.trained import Found, Study, measure, named
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import OptionError
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.loading import load_model
from tokencomp.reducers.selector import TRAIN
from tokencomp.trained.cards import locate, model_facts
from tokencomp.training.selector.train import RATIOS

NAME, DIVERSE = "selector of features", "selector of features, mmr"
OTHERS = ("selector", "auto", "kcenter", "random")
RIVALS = dict.fromkeys((NAME, DIVERSE), (*OTHERS, "uniform"))

WHY = """The network sees no question, so it can only learn what questions tend to be about. In
these images that is what is drawn on a background, and `kcenter` (`auto` on images) finds this
without training: no paired test finds a difference. So no weights of this kind ship. Layers and
channels were chosen by the loss on validation labels."""


def methods(weights: str) -> list[Setting]:
    """All rivals but `uniform`, which `measure` adds, at every ratio."""
    options = {"weights": weights, "input": "features"}
    return [
        way
        for ratio in RATIOS
        for way in (
            named(NAME, ratio, "selector", options),
            named(DIVERSE, ratio, "selector", {**options, "pick": "mmr"}),
            *(named(name, ratio) for name in OTHERS),
        )
    ]


def measured(args: argparse.Namespace) -> Iterator[Found]:
    """The selectors and their rivals on every set."""
    if args.weights is None:
        raise OptionError(f"give --weights. Train some: {TRAIN} --input features")
    model, processor = load_model(args.model, device=args.device)
    facts = model_facts(adapter_for(model))
    files = {NAME: locate(args.weights, facts, "selector", TRAIN)}
    files["selector"] = locate(None, facts, "selector", TRAIN)
    cards = {name: file.with_suffix(".json") for name, file in files.items()}
    for name in args.sets:
        questions, batch = source(name, args)
        asked = methods(str(files[NAME]))
        found, every = measure({"": model}, processor, questions, asked, name, batch, smaller=())
        yield name, found.table(every), found.runs, cards


STUDY = Study("selector_features", SETS, measured, RIVALS, WHY)


if __name__ == "__main__":
    STUDY.main(__doc__)
