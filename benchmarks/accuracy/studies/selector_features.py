"""The selector of features, which servers can run, against what it competes with.

    tokencomp train selector --input features --model tiny-qwen2-vl --output FOLDER ...
    python -m benchmarks.accuracy.studies.selector_features --weights FOLDER

writes selector_features.json and selector_features.md. Rivals are the selector that lies beside the
model and reads attention, the library's default, the default of servers, and the baselines. The
sets are those of the selector; `--sets` runs some only, the others stay as they are.
"""

from __future__ import annotations

import argparse

from benchmarks.accuracy.studies.selector import SETS
from benchmarks.accuracy.studies.trained import StudyTables, measure, named, parser
from tokencomp.adapters.registry import adapter_for
from tokencomp.cli import one_message
from tokencomp.errors import OptionError
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.loading import load_model
from tokencomp.reducers.selector import TRAIN
from tokencomp.trained.cards import locate, model_facts
from tokencomp.training.data import ShapesQuestions
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


def main(args: argparse.Namespace) -> None:
    study = StudyTables("selector_features", args, RIVALS)
    if study.sets:
        if args.weights is None:
            raise OptionError(f"give --weights. Train some: {TRAIN} --input features")
        model, processor = load_model(args.model, device=args.device)
        facts = model_facts(adapter_for(model))
        files = {NAME: locate(args.weights, facts, "selector", TRAIN)}
        files["selector"] = locate(None, facts, "selector", TRAIN)
        cards = {name: file.with_suffix(".json") for name, file in files.items()}
    for name in study.sets:
        scene = {k: v for k, v in SETS[name].items() if k == "frames"}
        count = args.items // SETS[name]["fewer"]
        source = ShapesQuestions(SETS[name]["families"], count, args.split, **scene)
        batch = 8 if scene else args.batch
        asked = methods(str(files[NAME]))
        measured, every = measure({"": model}, processor, source, asked, name, batch, smaller=())
        study.add(name, measured.table(every), measured.runs, cards)
        study.write(WHY)
    study.write(WHY)


if __name__ == "__main__":
    with one_message():
        main(parser(__doc__, SETS).parse_args())
