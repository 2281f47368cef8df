"""Train a tiny model on sessions of drawn screens, from the weights of an embedded model.

    python -m recipes.screens.build            # without delta
    python -m recipes.screens.build --delta    # from the model before, with it

`benchmarks/screens/answers.md` says how long the run behind it took. Stop it at any time: the same
command goes on where it stopped. The models come to the ignored folder `build/screens/`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from recipes.packing import Packer
from recipes.screens.train import Screens, ScreenStage, ScreenTrainer
from recipes.trainer import arguments
from tokencomp.cli import one_message
from tokencomp.inputs.loading import load_folder
from tokencomp.inputs.packaged import resolve
from tokencomp.storage import write_json

FOLDER = Path(__file__).resolve().parents[2] / "build" / "screens"
START = "tiny-qwen3-vl-hard"
_SEVERAL = (2, 2, 3, 4)
RECIPE = (
    ScreenStage("one", 250, batch=24, steps_of=(1,), chat=0.3),
    ScreenStage("several", 224, batch=12, steps_of=_SEVERAL, chat=0.5, end=0.6),
    ScreenStage(
        "colors", 220, batch=12, steps_of=_SEVERAL, chat=0.5, start=0.6, end=0.25, colors=True
    ),
)
_LAST: dict[str, Any] = {"batch": 12, "steps_of": _SEVERAL, "chat": 0.7, "start": 0.25, "end": 0.02}
LONGER = (ScreenStage("longer", 110, **_LAST, colors=True),)
DELTA = (ScreenStage("delta", 110, **_LAST, colors=True, delta=0.7),)


def train(folder: Path, start: str, stages: Any, seed: int, stop_after: int | None) -> bool:
    """Train a model, and write what is there; whether the recipe is done."""
    source = Path(resolve(start))
    model, processor = load_folder(str(source))
    packer = Packer(processor.tokenizer, Screens())
    folder.mkdir(parents=True, exist_ok=True)
    trainer = ScreenTrainer(model, packer, stages, folder, seed)
    done = trainer.run(stop_after)
    write(model, source, folder / "model")
    counts = {stage.name: stage.steps for stage in stages}
    facts = trainer.facts(done, start=Path(start).name, stages=counts)
    write_json(folder / "model" / "training.json", facts)
    print(json.dumps(facts["training_scores"]), flush=True)
    return done


def write(model: Any, source: Path, folder: Path) -> None:
    """The weights as float16, beside the other files of the model they started from."""
    from safetensors.torch import save_file

    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tokencomp"))
    for name in ("README.md", "metrics.json"):
        (folder / name).unlink(missing_ok=True)
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delta", action="store_true", help="go on with delta's cells dropped")
    parser.add_argument("--longer", action="store_true", help="go on as long without: the control")
    args = arguments(parser, FOLDER)
    which = "delta" if args.delta else "longer" if args.longer else "full"
    stages = {"full": RECIPE, "delta": DELTA, "longer": LONGER}[which]
    start = START if which == "full" else str(args.out / "full" / "model")
    train(args.out / which, start, stages, args.seed, args.stop_after)


if __name__ == "__main__":
    with one_message():
        main()
