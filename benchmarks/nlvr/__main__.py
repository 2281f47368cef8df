"""Ask a model that was trained on NLVR about its development and test splits.

    python -m recipes.nlvr.build FOLDER    # trains it; goes on where it stopped
    python -m benchmarks.nlvr FOLDER       # → results.json, README.md

`FOLDER` is the folder `nlvr` of the repository lil-lab/nlvr (CC-BY-4.0). Nothing of it is copied.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.experiment import Experiment
from benchmarks.nlvr.page import page
from tokencomp.errors import OptionError

OPTIONS = {
    "CORPUS": (None, "folder `nlvr` of lil-lab/nlvr"),
    "weights": (Path("build/nlvr"), "folder of the training"),
    "seed": (0, "of the training"),
}


def measure(args: Namespace) -> Iterator[dict[str, Any]]:
    """The answers to the pictures and sentences of the corpus."""
    from benchmarks.nlvr.evaluate import ask

    if args.corpus is None:
        raise OptionError("give the folder `nlvr` of the repository lil-lab/nlvr.")
    yield from ask(args.corpus, args.weights, args.seed)


EXPERIMENT = Experiment("nlvr/results", measure, page, options=OPTIONS, readme=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
