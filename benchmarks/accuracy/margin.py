"""condiv's margin, asked on ten times as many image questions as choose.py asks.

python benchmarks/accuracy/margin.py            # asks what was not asked yet → margin.md
python benchmarks/accuracy/margin.py --report   # from results that are there
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from choose import asked, preference
from ranking import Candidate, answered, rank, settings
from report import made_by, read_all
from results import RESULTS, Results
from run import RATIOS
from tables import table

from tokencomp.cli import one_message
from tokencomp.evaluation.settings import FULL
from tokencomp.trained.cards import replace_file
from tokencomp.zoo import available_models

HERE = Path(__file__).parent
FOLDER = HERE / "margin"
MARGINS = (0.0, 0.05, 0.1, 0.2)
FAMILIES = ("attribute", "existence", "count", "small_object")

RULE = """choose.py has 40 questions per family, which cannot tell margins apart. Here are 400 of
every image family, and its rule: of the margins tied with the best on the learned families, the one
with most points to spare over the bars. Counting is shown for every model, though two have not
learned it by that rule: there small margins keep more. What led here: on [1500 test
questions](counting/README.md) `uniform` counted better than the default (margin 0.2) on
tiny-llava-onevision at 0.5 (83 won, 61 lost, p = 0.08). A rule made for that, the best mean over
all four families, would have chosen 0.05 by 0.3 points (161 answers won, 117 lost against 0.2, over
models and ratios); asked on the test split, 0.05 left counting below `uniform` there (68 won, 82
lost, p = 0.29) and missed the bar of 97 that is narrowest (tiny-qwen2-vl, images, 0.75: 96.6 %),
which 0.2 meets (97.6 %). So the older rule stays, and with it the default. That is a decision for
which test answers were looked at, the only one; what the default is worth is therefore asked on
test questions from 1500 on, which had no part in it: [unseen](unseen/README.md)."""


def candidate(margin: float) -> Candidate:
    return "condiv", {"power": 1.0, "margin": margin}


CANDIDATES = [candidate(margin) for margin in MARGINS]


def read(folder: Path) -> list[Results]:
    """Models that answered all; learned families are those of the questions of choose.py."""
    known = {one.manifest["model"]: one.learned for one in read_all(RESULTS, "validation")}
    every = read_all(folder, "validation")
    found = [replace(one, learned=known.get(one.manifest["model"], one.learned)) for one in every]
    return [one for one in found if all(answered([one], c) for c in CANDIDATES)]


def chosen(results: list[Results]) -> float:
    """The margin that the rule picks."""
    tied = [row for row in rank(results, CANDIDATES) if row["tied"]]
    return float(max(tied, key=preference)["options"]["margin"])


def page(results: list[Results]) -> str:
    best, rows = chosen(results), []
    for r in rank(results, CANDIDATES):
        margin, (low, high) = r["options"]["margin"], r["difference"]
        name = f"**{margin:g}**" if margin == best else f"{margin:g}"
        tied = " tied" if r["tied"] else ""
        told = [f"{r['score']:.2%}", f"[{low:+.2%}, {high:+.2%}]{tied}", f"{100 * r['spare']:+.2f}"]
        rows.append([name, *told])
    head = ["margin", "score", "difference to best (95 %)", "to spare"]
    parts = ["# The margin of condiv", RULE.replace("\n", " "), f"Chosen: {best:g}."]
    return "\n\n".join([*parts, table(head, rows), *map(model_part, results)]) + "\n"


def model_part(one: Results) -> str:
    """Accuracy per family, ratio and margin."""
    head = ["ratio", "margin", *FAMILIES]
    rows = [["0", "", *(f"{one.accuracy(FULL, family):.1%}" for family in FAMILIES)]]
    for (i, ratio), margin in itertools.product(enumerate(RATIOS), MARGINS):
        label = settings(candidate(margin))[i].label
        cells = [f"{one.accuracy(label, family):.1%}" for family in FAMILIES]
        rows.append([f"{ratio:g}", f"{margin:g}", *cells])
    learned = ", ".join(family for family in FAMILIES if family in one.learned)
    told = f"{one.manifest['items']} validation questions. Learned: {learned}."
    return "\n\n".join([f"## {one.manifest['model']}", told, table(head, rows), made_by(one)])


def main() -> None:
    folder = asked(str(__doc__), CANDIDATES, 400, FAMILIES, FOLDER)
    results = read(folder)
    if {*available_models()} == {one.manifest["model"] for one in results}:
        text = page(results)
        replace_file(folder.with_suffix(".md"), lambda part: part.write_text(text))
        print(f"chosen: {chosen(results):g}")


if __name__ == "__main__":
    with one_message():
        main()
