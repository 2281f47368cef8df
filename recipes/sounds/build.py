"""Train a tiny model that listens, from scratch.

    python -m recipes.sounds.build

`benchmarks/sounds/README.md` says how long the run behind it took. Stop it at any time: the same
command goes on where it stopped. It downloads nothing. The model comes to the ignored folder
`build/sounds/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from recipes.sounds.batches import SoundBatches
from recipes.sounds.model import build, build_processor, build_tokenizer, save
from recipes.sounds.train import RECIPE, SoundTrainer
from recipes.trainer import arguments
from tokencomp.cli import one_message
from tokencomp.storage import write_json

FOLDER = Path(__file__).resolve().parents[2] / "build" / "sounds"


def train(folder: Path, seed: int, stop_after: int | None) -> bool:
    """Train the model, and write what is there; whether the recipe is done."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(folder / "tokenizer")
    model = build(tokenizer)
    maker = SoundBatches(build_processor(tokenizer), seed)
    trainer = SoundTrainer(model, maker, RECIPE, folder)
    done = trainer.run(stop_after)
    save(model.eval(), tokenizer, folder / "model")
    facts = trainer.facts(
        done,
        stages={stage.name: stage.steps for stage in RECIPE},
        parameters=sum(p.numel() for p in model.parameters()),
    )
    write_json(folder / "model" / "training.json", facts)
    print(json.dumps(facts["training_scores"]), flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = arguments(parser, FOLDER)
    train(args.out, args.seed, args.stop_after)


if __name__ == "__main__":
    with one_message():
        main()
