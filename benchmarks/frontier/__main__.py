"""Speed of the first token against accuracy, over tower ratios, places of the stage and ratios.

    python -m benchmarks.frontier answers                  # validation questions
    python -m benchmarks.frontier clock --rounds 2         # on a quiet machine, 25 minutes
    python -m benchmarks.frontier answers --split test     # after both: frontier and baselines
    python -m benchmarks.frontier page

writes clock.json, answers.json and README.md. The settings are in `grid.py`, the rule that chooses
one in `page.py`.
"""

from __future__ import annotations

import json

from benchmarks import publishing
from benchmarks.experiment import write
from benchmarks.frontier import answers, clock
from benchmarks.frontier.grid import points
from benchmarks.frontier.page import HERE, Measured, files
from tokencomp.cli import one_message


def main() -> None:
    parser = publishing.parser(__doc__, HERE, "--output", report=False)
    parser.add_argument("part", choices=("answers", "clock", "page"))
    parser.add_argument(
        "--modalities", nargs="+", choices=list(clock.SIDES), default=["image", "video"]
    )
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--per-family", type=int, default=40)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    book, times = args.output / "answers.json", args.output / "clock.json"
    for modality in args.modalities if args.part != "page" else ():
        if args.part == "clock":
            clock.measure(modality, points(), args, times)
            continue
        asked = points()
        if args.split == "test":
            measured = Measured(modality, json.loads(times.read_text()), answers.read(book))
            asked = measured.tested()
        answers.answer(modality, asked, args, book)
    if args.part == "page":
        write(files(args.output))


if __name__ == "__main__":
    with one_message():
        main()
