"""Train a tiny model on NLVR, and ask it about the development and test splits.

    python -m benchmarks.nlvr train FOLDER     # goes on where it stopped
    python -m benchmarks.nlvr evaluate FOLDER  # → results.json, README.md

`FOLDER` is the folder `nlvr` of the repository lil-lab/nlvr (CC-BY-4.0). Nothing of it is copied.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import publishing
from benchmarks.nlvr.evaluate import evaluate
from benchmarks.nlvr.page import PAGE, RESULTS, page
from recipes.nlvr.build import FOLDER, train
from recipes.trainer import arguments
from tokencomp.cli import one_message
from tokencomp.storage import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "evaluate", "page"))
    parser.add_argument("corpus", type=Path, nargs="?", help="not for `page`")
    args = arguments(parser, FOLDER)
    if args.what == "train":
        print(json.dumps(train(args.corpus, args.out, args.seed, args.stop_after)), flush=True)
        return
    if args.what == "evaluate":
        publishing.write(RESULTS, evaluate(args.corpus, args.out, args.seed))
    write_text(PAGE, page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    with one_message():
        main()
