"""Every page, rebuilt from stored results, and its tables as CSV files.

    python -m benchmarks.pages                     # all of them
    python -m benchmarks.pages serving/agents accuracy/unseen
    python -m benchmarks.pages serving/transfer --csv    # its tables, beside the page
    python -m benchmarks.pages --list

Tables of the README come from `benchmarks.figures`. The page of `benchmarks.kernels.aot` is rebuilt
by that command alone: importing it sets what Triton reads from the environment.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from benchmarks.accuracy import report
from benchmarks.accuracy.store import ACCURACY, RESULTS
from benchmarks.accuracy.studies import (
    adsc,
    baselines,
    ccam,
    choose,
    intervals,
    long_video,
    margin,
    newer,
    order,
    pixels,
    retrieval,
    selector,
    selector_features,
    session,
    tower,
)
from benchmarks.experiment import Files, write
from benchmarks.files import accuracy as frames
from benchmarks.files import clock, stream
from benchmarks.frontier import page as frontier
from benchmarks.gpu import recompute
from benchmarks.kernels import calls, roofline, weights
from benchmarks.long import choice as long_choice
from benchmarks.long import page as long_answers
from benchmarks.models import chunked_prefill, decoding, prefill, rounding, total
from benchmarks.models import tower as first_token
from benchmarks.mutants import __main__ as mutants
from benchmarks.peers import run as peers
from benchmarks.publishing import FOLDER
from benchmarks.real import candidates, clip_answers, clips
from benchmarks.real import run as photographs
from benchmarks.screens import __main__ as screens
from benchmarks.screens import answers, receipts
from benchmarks.serving import (
    agents,
    attacker,
    burst,
    clients,
    merging,
    positions,
    ratio_zero,
    transfer,
)
from benchmarks.serving import run as serving
from benchmarks.sounds import run as sounds
from tokencomp.cli import one_message

EXPERIMENTS = [
    module.EXPERIMENT
    for module in (
        intervals, pixels, retrieval, session, frames, clock, stream, calls, weights,
        chunked_prefill, decoding, prefill, rounding, first_token, total, peers, photographs,
        candidates, clip_answers, clips, screens, answers, receipts, agents, attacker, burst,
        clients, merging, positions, ratio_zero, serving, sounds, transfer,
    )
]  # fmt: skip
STUDIES = [module.STUDY for module in (adsc, ccam, selector, selector_features)]
SETS = ("results", "unseen", "counting", "chance", "hard", "long")
LONG_VIDEO = ("tiny-qwen2-vl", "tiny-llava-onevision")
PAGES: dict[str, Callable[[], Files]] = {
    **{one.name: one.files for one in EXPERIMENTS},
    **{f"accuracy/{one.name}": one.files for one in STUDIES},
    **{
        f"accuracy/long_video-{model}": lambda model=model: long_video.STUDY.files(model)
        for model in LONG_VIDEO
    },
    **{f"accuracy/{name}": lambda name=name: report.files(ACCURACY / name) for name in SETS},
    "accuracy/baselines": baselines.files,
    "accuracy/choice": lambda: choose.files(RESULTS),
    "accuracy/margin": margin.files,
    "accuracy/newer": newer.files,
    "accuracy/order": order.files,
    "accuracy/tower": tower.files,
    "frontier": frontier.files,
    "kernels/roofline": roofline.files,
    "mutants": lambda: {
        mutants.PAGE: mutants.page(mutants.read(), json.loads(mutants.RESULTS.read_text()))
    },
    "long": long_answers.files,
    "long/choice": lambda: long_choice.files(long_answers.FOLDER),
    "readers": recompute.files,
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
