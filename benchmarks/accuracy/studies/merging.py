"""Candidates for the default with merged tokens, on validation questions of embedded models.

python -m benchmarks.accuracy.studies.merging --models tiny-qwen2-vl   # runs what is missing
python -m benchmarks.accuracy.studies.merging --report                 # from the stored results

The answers stand in the last table of choice.md, beside the stored ones of the default.
"""

from __future__ import annotations

from benchmarks.accuracy.report import page_folder
from benchmarks.accuracy.store import RESULTS
from benchmarks.accuracy.studies.choose import (
    ASKED,
    QUESTION_FAMILIES,
    evidence,
    run_missing,
    write_choice,
)
from tokencomp.cli import one_message


def main() -> None:
    folder = run_missing(str(__doc__), ASKED, 40, QUESTION_FAMILIES, RESULTS)
    write_choice(evidence(folder), page_folder(folder.resolve()))


if __name__ == "__main__":
    with one_message():
        main()
