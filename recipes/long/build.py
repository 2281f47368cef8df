"""Train a tiny model that writes long answers, from the weights of an embedded model.

    python -m recipes.long.build
    python -m recipes.long.build --model tiny-gemma3 --out build/long-gemma3

Stop it at any time: the same command goes on where it stopped. The model comes to the ignored
folder `build/long/`; `--start FOLDER` goes on from weights that are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from recipes.long.train import PLANS, START, LongTrainer, start
from recipes.trainer import arguments
from tokencomp.cli import one_message
from tokencomp.inputs.loading import load_folder
from tokencomp.inputs.packaged import model_path
from tokencomp.storage import write_json

FOLDER = Path(__file__).resolve().parents[2] / "build" / "long"


def write(
    trainer: LongTrainer, tokenizer: Any, folder: Path, finished: bool, model: str = START
) -> None:
    """Weights as float16 beside the files of the start, with its new words; what training took."""
    from safetensors.torch import save_file

    ignored = shutil.ignore_patterns("tokencomp", "README.md", "metrics.json")
    shutil.copytree(model_path(model), folder, dirs_exist_ok=True, ignore=ignored)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(trainer.model.get_input_embeddings().weight)
    write_json(folder / "config.json", config)
    words = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**words, "added_tokens_decoder": added})
    state = {k: v.detach().half().contiguous() for k, v in trainer.model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    facts = trainer.facts(finished, model=model)
    write_json(folder.parent / "training.json", facts)
    print(json.dumps(facts["training_scores"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=START, choices=[*PLANS], help="whose weights go on")
    parser.add_argument(
        "--start", type=Path, help="folder of a model with the words of the answers"
    )
    parser.add_argument("--from-stage", help="first stage that is trained")
    args = arguments(parser, FOLDER)
    model, processor = load_folder(str(args.start)) if args.start else start(args.model)
    plan = PLANS[args.model]
    names = [stage.name for stage in plan.stages]
    stages = plan.stages[names.index(args.from_stage or names[0]) :]
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = LongTrainer(plan.family, model, processor.tokenizer, stages, args.out, args.seed)
    finished = trainer.run(args.stop_after)
    write(trainer, processor.tokenizer, args.out / "model", finished, args.model)


if __name__ == "__main__":
    with one_message():
        main()
