"""Train a tiny model to click on pages of MiniWoB++, from the weights of an embedded model.

    python -m recipes.clicks.pages     # Chromium writes the pages to build/clicks/
    python -m recipes.clicks.build

Stop it at any time: the same command goes on where it stopped. The model comes to the ignored
folder `build/clicks/run/`.
"""

from __future__ import annotations

import argparse
import json

from recipes.clicks.pages import FOLDER
from recipes.clicks.screens import Pages
from recipes.clicks.train import ClickStage, ClickTrainer, start
from recipes.trainer import arguments
from tokencomp.cli import one_message
from tokencomp.storage import write_json

START = "tiny-qwen3-vl-hard"
_PAGE = ((0.75, 10, 0.5), (0.15, 7, 0.5), (0.1, 10, 1.0))
_ALL = ((0.35, 10, 0.5), (0.2, 10, 1.0), (0.2, 14, 1.0), (0.15, 20, 1.0), (0.1, 7, 1.0))
RECIPE = (
    ClickStage("pages", 1000, batch=8, views=_PAGE, end=0.4),
    ClickStage("screens", 700, batch=8, views=_ALL, start=0.4, end=0.02),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args = arguments(parser, FOLDER / "run")
    model, processor = start(START)
    pages = Pages(FOLDER / "train.npz")
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = ClickTrainer(model, processor.tokenizer, pages, RECIPE, args.out, args.seed)
    done = trainer.run(args.stop_after)
    model.config.text_config._attn_implementation = "sdpa"
    model.half().save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")
    facts = trainer.facts(done, start=START)
    write_json(args.out / "training.json", facts)
    print(json.dumps(facts["training_scores"]), flush=True)


if __name__ == "__main__":
    with one_message():
        main()
