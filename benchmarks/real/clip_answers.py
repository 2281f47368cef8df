"""Ask the model of this benchmark about clips of photographs, with every method.

    python -m benchmarks.real.clip_answers            # clip_answers.json, clip_answers.md
    python -m benchmarks.real.clip_answers --report   # the page from its results alone

The frames of a clip reach the model as single pictures, because it takes no videos. A run that was
stopped goes on from the answers in the ignored folder `build/real/clips/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiment import Experiment
from benchmarks.real.run import METHODS, OPTIONS, Pairs, answered, page, records
from recipes.photographs.build import FOLDER
from recipes.photographs.clip_questions import ClipItem, clip_items
from recipes.photographs.scenes import Library
from recipes.photographs.sources import Photos
from tokencomp.evaluation.settings import FEWER_FRAMES
from tokencomp.inputs.questions import Example

FAMILIES = ("existence", "appears")
SIZE, FRAMES, SECONDS = 448, 6, 10.0
HEAD = f"""# What happens to clips of photographs?

`python -m benchmarks.real.clip_answers`, with the [model of photographs](README.md). Clips of
{SECONDS:g} seconds in which a camera stands still, pans or zooms, while things appear, move and
leave: "Is there an X at any time?" and "Which thing appears and then stays?". The model takes no
videos, so it sees {FRAMES} frames as pictures, {FRAMES * 196} visual tokens; every reducer keeps
the same share of each. It was trained on single pictures, does not compare them (other question
types were left out), and no clip had a part in its training. `downscale` makes all frames smaller,
`fewer_frames` takes fewer of them. Intervals are wide: one model, few questions.
"""


def clip_pairs(library: Library, per_family: int, folder: Path) -> Pairs:
    """Clips of both splits, as files below `folder`, with their questions in words."""
    folder.mkdir(parents=True, exist_ok=True)

    def example(one: ClipItem) -> Example:
        path = folder / f"{one.id}.mp4"
        if not path.exists():
            one.write(path, SIZE)
        return Example(one.id, one.query.text, one.answer, (path,), one.query.family)

    return {
        split: [
            (one, example(one)) for one in clip_items(library, split, per_family, FAMILIES, SECONDS)
        ]
        for split in ("validation", "test")
    }


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All questions about clips."""
    yield answered(args, clip_pairs(Photos(args.photos), args.per_family, args.runs / "media"))


CHANGED = {
    "runs": FOLDER / "clips",
    "per_family": 40,
    "batch": 4,
    "frames": FRAMES,
    "methods": [*METHODS[:2], FEWER_FRAMES, *METHODS[2:]],
}
EXPERIMENT = Experiment(
    "real/clip_answers", measure, partial(page, head=HEAD), records, OPTIONS | CHANGED
)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
