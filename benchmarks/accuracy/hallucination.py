"""Does compression make a model see things? From stored answers about what is and is not there.

    python -m benchmarks.accuracy.hallucination

writes hallucination.md from the answers in `unseen/`; no model runs.
"""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks import publishing
from benchmarks.accuracy.store import ACCURACY, Results
from benchmarks.experiment import Files, write

FAMILIES = {"existence": "images", "video_existence": "clips"}
SETTINGS = {
    "full": "full",
    "auto-0.5": "0.5",
    "auto-0.75": "0.75",
    "auto-0.9": "0.9",
    "auto-0.9-merge=False": "0.9, dropped",
    "downscale-0.75": "smaller, 0.75",
}
LIMIT = 1.959963984540054
INTRO = """Questions "Is there a red circle?" of the unseen set (200 about images, 200 about
clips), with one word as the answer. **False yes**: of the questions about an absent thing, how
many are answered wrongly: the model sees what is not there. **Miss**: of those about a present
thing, how many are answered wrongly. In brackets, Wilson's 95 % interval. Settings are the
default at a ratio; dropped: without merging; smaller: pictures with as few tokens as at 0.75,
without a patch. A wrong answer to a yes-or-no question is counted as the other word."""
RULE = """Up to ratio 0.75 the default makes no model see more things than without compression,
beyond chance. What grows is what it misses, above 0.75 and in Gemma 3 most. Smaller pictures
raise both in the Qwen families, and misses in clips of all. No 7B model was asked, and drawn
scenes have no things that belong together, by which large models guess (POPE, arXiv
2305.10355)."""


def interval(wrong: int, count: int) -> str:
    """Share with Wilson's interval."""
    share, z2 = wrong / count, LIMIT**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = LIMIT * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    low, high = max(0.0, middle - half), middle + half
    return f"{100 * share:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def rows(folder: Path, absent: bool) -> list[list[str]]:
    """Per model and medium: errors about absent, or about present, things under every setting."""
    found = []
    for model in sorted(one.name for one in folder.iterdir() if one.is_dir()):
        answers = Results.read(folder / model, "test").answers
        questions = answers.questions
        for family, medium in FAMILIES.items():
            places = [
                i
                for i, kind in enumerate(questions.families)
                if kind == family and questions.answers[i] == ("no" if absent else "yes")
            ]
            if not places:
                continue
            row = [f"{model}, {medium} ({len(places)})"]
            for label in SETTINGS:
                correct = answers.correct.get(label)
                wrong = 0 if correct is None else sum(1 - correct[i] for i in places)
                row.append("–" if correct is None else interval(wrong, len(places)))
            found.append(row)
    return found


def files(folder: Path = ACCURACY) -> Files:
    """The page of stored answers."""
    head = ["model", *SETTINGS.values()]
    parts = ["# What a compressed model sees that is not there, and what it misses", INTRO]
    parts += ["## False yes", publishing.table(head, rows(folder / "unseen", absent=True))]
    parts += ["## Misses", publishing.table(head, rows(folder / "unseen", absent=False))]
    parts += ["## In short", RULE]
    runs = "Answers, commits and dates: [unseen questions](unseen/README.md)."
    text = "\n\n".join(part.replace("\n", " ") if part in (INTRO, RULE) else part for part in parts)
    return {folder / "hallucination.md": f"{text}\n\n{runs}\n"}


if __name__ == "__main__":
    write(files())
