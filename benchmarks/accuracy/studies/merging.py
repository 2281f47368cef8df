"""Candidates for the default with merged tokens, on validation questions of embedded models.

python -m benchmarks.accuracy.studies.merging --models tiny-qwen2-vl   # runs what is missing
python -m benchmarks.accuracy.studies.merging --report                 # from the stored results

The answers are in the last tables of choice.md, with the stored ones of the default.
"""

from __future__ import annotations

from benchmarks.accuracy.report import page_folder
from benchmarks.accuracy.store import RESULTS
from benchmarks.accuracy.studies.choose import (
    ASKED,
    LEFT_OUT,
    QUESTION_FAMILIES,
    SCORED,
    Candidate,
    evidence,
    run_missing,
    write_choice,
)
from benchmarks.real.candidates import CANDIDATES
from tokencomp.cli import one_message


def asked(model: str) -> list[Candidate]:
    """What a model is asked: the first layer of tiny-qwen3-5 has no attention to score with."""
    if model not in LEFT_OUT:
        return ASKED
    return [*CANDIDATES, *(SCORED if model != "tiny-qwen3-5" else ())]


def main() -> None:
    folder = run_missing(str(__doc__), asked, 40, QUESTION_FAMILIES, RESULTS)
    write_choice(evidence(folder), page_folder(folder.resolve()))


if __name__ == "__main__":
    with one_message():
        main()
