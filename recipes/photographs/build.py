"""Build a model of a real image encoder and a real language model that learn to work together.

    python -m recipes.photographs.build              # the whole recipe
    python -m recipes.photographs.build --share 0.1  # a tenth of the steps with the decoder

`benchmarks/real/README.md` says how long the run behind it took: the whole recipe needs one to two
and a half hours of one core with bfloat16 units. Stop it at any time: the same command goes on
where it stopped. It downloads nothing; it says what to install. The model comes to the ignored
folder `build/real/`.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

from recipes.photographs.sources import LANGUAGE, TOWER, TUXPAINT, Photos, missing, weights
from tokencomp.cli import one_message
from tokencomp.errors import OptionError
from tokencomp.storage import write_json

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "real"


def build(folder: Path, photos: Path, share: float, seed: int, stop_after: int | None) -> bool:
    """Assemble the model once, train it, and write it with its adapters merged.

    Returns
    -------
    bool
        Whether the recipe is done.
    """
    from recipes.photographs.batches import StampBatches
    from recipes.photographs.model import assemble, last_blocks, load, save
    from recipes.photographs.train import RECIPE, StampTrainer, shortened

    library = Photos(photos)
    library.files, library.landscapes, library.further  # noqa: B018 - says now what is missing
    base = folder / "base"
    if not (base / "config.json").exists():
        print("reading the weights of both packages", flush=True)
        save(*assemble(weights(TOWER), weights(LANGUAGE)), base)
    model, processor = load(base)
    maker = StampBatches(processor.tokenizer, library, seed)
    recipe = shortened(RECIPE, share)
    trainer = StampTrainer(model, maker, last_blocks(model), recipe, folder)
    done = trainer.run(stop_after)
    facts = trainer.facts(
        done,
        share=share,
        stages={stage.name: stage.steps for stage in recipe},
        reached=recipe[trainer.phase].name if not done else "end",
        step=trainer.step,
        trained_parameters=sum(t.numel() for t in trainer.parameters.values()),
    )
    write(trainer, processor, folder / "model", facts)
    return done


def write(trainer: Any, processor: Any, folder: Path, facts: dict[str, Any]) -> None:
    """The merged model as a Hugging Face folder, with the facts of its training."""
    from recipes.photographs.model import save

    save(trainer.merged(), processor.tokenizer, folder)
    write_json(folder / "training.json", facts)
    print(json.dumps(facts["training_scores"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--photos", type=Path, default=TUXPAINT, help="folder of Tux Paint's data")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the steps in which the decoder is trained"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stop-after", type=int, help="steps in this call; writes what is there")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if commands := missing():
        raise OptionError("packages are missing. Run:\n  " + "\n  ".join(commands))
    torch.set_num_threads(args.threads)
    build(args.out, args.photos, args.share, args.seed, args.stop_after)


if __name__ == "__main__":
    with one_message():
        main()
