"""Every page that is built from stored results, again, and its tables as CSV files.

    python -m benchmarks.pages                     # all of them
    python -m benchmarks.pages serving/burst accuracy/unseen
    python -m benchmarks.pages kernels/weights --csv      # its tables, next to the page
    python -m benchmarks.pages --list

Tables of the README come from `benchmarks.figures`. The page of `benchmarks.kernels.aot` is rebuilt
by that command alone: importing it sets what Triton reads from the environment.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module

from benchmarks.accuracy import hallucination, report
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies import baselines, choose, tower
from benchmarks.experiment import Files, write
from benchmarks.frontier import page as frontier
from benchmarks.frontier import speedup
from benchmarks.kernels import roofline
from benchmarks.long import choice as long_choice
from benchmarks.long import page as long_answers
from benchmarks.mutants import __main__ as mutants
from benchmarks.publishing import FOLDER
from tokencomp.cli import one_message

MODULES = """
clicks.__main__ kernels.calls kernels.weights
models.decoding models.prefill models.tower models.total nlvr.__main__ real.run
real.clip_answers screens.answers screens.receipts
serving.burst serving.clients serving.ratio_zero serving.run
"""
EXPERIMENTS = [import_module(f"benchmarks.{name}").EXPERIMENT for name in MODULES.split()]
SETS = ("results", "unseen", "counting", "chance", "hard", "long")
PAGES: dict[str, Callable[[], Files]] = {
    **{one.name: one.files for one in EXPERIMENTS},
    **{f"accuracy/{name}": lambda name=name: report.files(ACCURACY / name) for name in SETS},
    "accuracy/baselines": baselines.files,
    "accuracy/choice": choose.files,
    "accuracy/hallucination": hallucination.files,
    "accuracy/tower": tower.files,
    "frontier": frontier.files,
    "speedup": speedup.files,
    "kernels/roofline": roofline.files,
    "mutants": lambda: {
        mutants.PAGE: mutants.page(mutants.read(), json.loads(mutants.RESULTS.read_text()))
    },
    "long": long_answers.files,
    "long/choice": lambda: long_choice.files(long_answers.FOLDER),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *PAGES], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="only the names")
    parser.add_argument("--csv", action="store_true", help="tables as CSV files, and no pages")
    args = parser.parse_args()
    for name in args.names or PAGES:
        if args.list:
            print(name)
            continue
        for path in write(PAGES[name](), args.csv):
            print(path.relative_to(FOLDER.parent))


if __name__ == "__main__":
    with one_message():
        main()
