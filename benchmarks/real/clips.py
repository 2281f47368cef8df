"""Clips of photographs: questions for a model of your own, and what frame policies see of them.

    python -m benchmarks.real.clips --questions FOLDER  # clips and questions.jsonl
    python -m benchmarks.real.clips                     # test clips: clips.json, clips.md
    python -m benchmarks.real.clips --report            # only rebuilds the page

Things appear, leave and move on photographs that a camera pans over or zooms into. Both need the
photographs that `benchmarks/real/README.md` names, and no model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.files.stream import index_of
from recipes.photographs.clip_questions import ClipItem, clip_item, clip_items
from recipes.photographs.clips import MOMENT, SECONDS, STILL
from recipes.photographs.scenes import Library
from recipes.photographs.sources import TUXPAINT, Photos
from recipes.tiny.letters import letters_prompt
from tokencomp.errors import OptionError
from tokencomp.inputs.video.frames import frame_indices
from tokencomp.inputs.video.stream import stream_choice
from tokencomp.storage import write_lines
from tokencomp.zoo.shapesqa.prompt_forms import letter

COUNTS = (8, 16, 32)
SIZE = 448  # px, both sides
SHORTEST = 10.0  # seconds: shorter clips have no room for two events
CAMERAS = ("stands still", "zooms", "pans")


def write_questions(
    library: Library, folder: Path, split: str, per_family: int, seconds: float, size: int
) -> Path:
    """Clips as mp4 files below `folder`, and `questions.jsonl` with lettered options."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    rows = []
    for one in clip_items(library, split, per_family, seconds=seconds):
        media = one.write(folder / "media" / f"{one.id}.mp4", size)
        rows.append(
            {
                "id": one.id,
                "family": one.family,
                "media": media.relative_to(folder).as_posix(),
                "question": letters_prompt(one.query),
                "answer": letter(one.query),
            }
        )
    write_lines(folder / "questions.jsonl", rows)
    return folder / "questions.jsonl"


def clips(library: Library, split: str, each: int) -> Iterator[tuple[str, ClipItem]]:
    """The first `each` clips of every camera in which a thing is shown for a moment."""
    left, index = dict.fromkeys(CAMERAS, each), 0
    while any(left.values()):
        one = clip_item(library, split, "moment", index)
        kind = one.scene.camera if one.scene.camera == STILL else one.scene.camera.split()[0]
        if left[kind]:
            left[kind] -= 1
            yield kind, one
        index += 1


def row(one: ClipItem, kind: str, path: Path) -> dict[str, Any]:
    """For every number of frames, whether each policy takes one that shows the answer."""
    index, facts = index_of(path), {"clip": one.id, "camera": kind, "noise": one.scene.grain > 0}
    found: dict[str, Any] = {}
    for count in COUNTS:
        chosen, rule = stream_choice(index, count)
        for name, places in (("even", frame_indices(index.total, count)), ("stream", chosen)):
            found[f"{name} {count}"] = not one.evidence.isdisjoint(places)
        found[f"rule {count}"] = rule
    return {**facts, **found}


def measure(library: Library, split: str, each: int, size: int = SIZE) -> list[dict[str, Any]]:
    from tqdm import tqdm

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for kind, one in tqdm(clips(library, split, each), total=each * len(CAMERAS)):
            rows.append(row(one, kind, one.write(path, size)))
    return rows


def page(report: dict[str, Any]) -> str:
    """The page of a report."""
    rows = report["rows"]
    groups = [("all", "any", rows)]
    for kind in CAMERAS:
        for noise in (False, True):
            some = [r for r in rows if r["camera"] == kind and r["noise"] is noise]
            groups.append((kind, "yes" if noise else "no", some))
    head = ("camera", "noise", "clips", *(f"{count} frames" for count in COUNTS))
    body = [(kind, noise, str(len(some)), *_cells(some)) for kind, noise, some in groups]
    kept = [sum(r[f"even {c}"] and not r[f"stream {c}"] for r in rows) for c in COUNTS]
    rules = Counter(r["rule 8"].split(":")[0] for r in rows)
    return "\n".join(
        [
            '# Does `frames="stream:8"` find short events in clips of photographs?\n',
            publishing.table(head, body) + "\n",
            f"A thing is shown for {MOMENT:g} of {SECONDS} seconds on a photograph, while others "
            "appear, move and disappear. Cells: clips in which a chosen frame shows it, even "
            f"spacing / [the stream](../files/stream.md). {report['split'].capitalize()} clips, on "
            "which nothing was chosen. They are composed, and encoded as H.264 without cuts, so "
            "they say little about edited films.\n",
            "Clips where even spacing shows it and the stream does not: "
            + ", ".join(f"{n} at {c} frames" for n, c in zip(kept, COUNTS, strict=True))
            + f", of {len(rows)}. What the rule took these clips for at 8 frames: "
            + ", ".join(f"{rule} {n}" for rule, n in sorted(rules.items()))
            + ".\n",
        ]
    )


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    return [
        " / ".join(str(sum(r[f"{name} {count}"] for r in rows)) for name in ("even", "stream"))
        for count in COUNTS
    ]


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Test clips of every camera; with `--questions` clips and questions, and no results."""
    if args.size % 2 or args.seconds < SHORTEST:
        raise OptionError(
            f"--size {args.size} has to be even, and --seconds {args.seconds:g} at least "
            f"{SHORTEST:g}."
        )
    library = Photos(args.photos)
    if args.questions:
        how = (args.split, args.per_family, args.seconds, args.size)
        print(write_questions(library, Path(args.questions), *how))
    else:
        yield {"split": args.split, "rows": measure(library, args.split, args.each)}


OPTIONS = {
    "photos": (TUXPAINT, "folder of Tux Paint"),
    "split": ("test", "", ("validation", "test")),
    "each": (20, "clips of each kind of camera"),
    "questions": (None, "write questions there, and measure nothing"),
    "per_family": (20, "questions of each family"),
    "seconds": (SECONDS, "length of their clips"),
    "size": (SIZE, "px of both sides, even"),
}
EXPERIMENT = Experiment("real/clips", measure_all, page, options=OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
