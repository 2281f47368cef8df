"""Train a tiny model on NLVR, or take what a training has reached.

    python -m recipes.nlvr.build FOLDER    # the folder `nlvr` of the repository lil-lab/nlvr

A training that was stopped goes on where it stopped. It downloads nothing. The model comes to the
ignored folder `build/nlvr/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recipes.nlvr.corpus import examples
from recipes.nlvr.train import RECIPE, NlvrTrainer, start
from recipes.trainer import arguments
from tokencomp.cli import one_message
from tokencomp.storage import write_json

FOLDER = Path(__file__).resolve().parents[2] / "build" / "nlvr"


def train(corpus: Path, out: Path, seed: int = 0, stop_after: int | None = None) -> dict[str, Any]:
    """Train on the training split in `corpus`; the facts that `reached` writes."""
    trainer, processor = trainer_of(corpus, out, seed)
    trainer.run(stop_after)
    return _written(trainer, processor, out)


def reached(corpus: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    """Write the model of the last checkpoint, with `training.json` beside it; what that says."""
    return _written(*trainer_of(corpus, out, seed), out)


def trainer_of(corpus: Path, out: Path, seed: int) -> tuple[NlvrTrainer, Any]:
    """The training of `corpus` as far as it is in `out`, and the processor of its model."""
    model, processor = start()
    split = examples(corpus, "train")
    return NlvrTrainer(model, processor.tokenizer, split, RECIPE, out, seed), processor


def _written(trainer: NlvrTrainer, processor: Any, out: Path) -> dict[str, Any]:
    folder = out / "model"
    trainer.model.save_pretrained(folder)
    processor.save_pretrained(folder)
    done = RECIPE[: trainer.phase]
    steps = {stage.name: stage.steps for stage in done}
    if trainer.phase < len(RECIPE):
        steps[RECIPE[trainer.phase].name] = trainer.step
    facts = trainer.facts(
        trainer.phase == len(RECIPE),
        stages={name: count for name, count in steps.items() if count},
        training_examples=len(trainer.examples),
        parameters=sum(p.numel() for p in trainer.model.parameters()),
    )
    write_json(folder / "training.json", facts)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    args = arguments(parser, FOLDER)
    print(json.dumps(train(args.corpus, args.out, args.seed, args.stop_after)), flush=True)


if __name__ == "__main__":
    with one_message():
        main()
