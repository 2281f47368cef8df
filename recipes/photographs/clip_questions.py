"""Questions about clips of StampsQA, and their items: functions of split, family and index.

    python -m recipes.photographs.clip_questions FOLDER  # clips and questions.jsonl, for a model

Things appear, leave and move on photographs that a camera pans over or zooms into.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from recipes.photographs.clips import (
    CAMERAS,
    MOMENT,
    RATE,
    SECONDS,
    STILL,
    ClipScene,
    clip_frames,
    sample_clip,
)
from recipes.photographs.questions import article, named
from recipes.photographs.scenes import Library
from recipes.photographs.sources import TUXPAINT, Photos
from recipes.tiny.letters import letters_prompt
from tokencomp.cli import one_message
from tokencomp.errors import OptionError
from tokencomp.storage import write_lines
from tokencomp.zoo.shapesqa.items import QueryFields, stream
from tokencomp.zoo.shapesqa.prompt_forms import letter
from tokencomp.zoo.shapesqa.questions import Question, draw_options
from tokencomp.zoo.shapesqa.render import encode_mp4
from tokencomp.zoo.shapesqa.scenes import DIRECTIONS

SHORTEST = 10.0  # seconds: shorter clips have no room for two events
APART = 2 * MOMENT  # seconds between two things of which one comes first

Asker = Callable[[ClipScene, tuple[str, ...], np.random.Generator], Question | None]


def _names_of(scene: ClipScene, first: bool, last: bool) -> list[str]:
    """Things that are, or are not, visible at the start and at the end."""
    pairs = zip(scene.picture.things, scene.acts, strict=True)
    return [
        thing.name
        for thing, act in pairs
        if (act.start == 0) is first and (act.end == scene.seconds) is last
    ]


def _only(
    family: str, text: str, chosen: list[str], scene: ClipScene, names: tuple[str, ...], rng
) -> Question | None:
    if len(chosen) != 1:
        return None
    return named(family, text, chosen[0], scene.picture, names, rng)


def appears(scene: ClipScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """Which thing comes and stays?"""
    chosen = _names_of(scene, False, True)
    return _only("appears", "Which thing appears and then stays?", chosen, scene, names, rng)


def leaves(scene: ClipScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """Which thing is there at first and not at the end?"""
    text = "Which thing is there at the start and disappears?"
    return _only("leaves", text, _names_of(scene, True, False), scene, names, rng)


def moment(scene: ClipScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """Which thing is visible for `MOMENT` alone?"""
    text = "Which thing is only shown for a moment?"
    return _only("moment", text, _names_of(scene, False, False), scene, names, rng)


def first(scene: ClipScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """Which of two things that come, comes first?"""
    pairs = zip(scene.picture.things, scene.acts, strict=True)
    late = [(act.start, thing.name) for thing, act in pairs if act.start > 0]
    if len(late) < 2:
        return None
    (a, early), (b, other) = sorted(late[i] for i in rng.permutation(len(late))[:2])
    if b - a < APART:
        return None
    order = (early, other) if rng.random() < 0.5 else (other, early)
    text = f"Which appears first, the {order[0]} or the {order[1]}?"
    return Question("first", text, early, order)


def direction(
    scene: ClipScene, names: tuple[str, ...], rng: np.random.Generator
) -> Question | None:
    """In which direction does the X move?"""
    pairs = zip(scene.picture.things, scene.acts, strict=True)
    moving = [(thing.name, act.direction) for thing, act in pairs if act.direction]
    if not moving:
        return None
    name, answer = moving[int(rng.integers(len(moving)))]
    options = draw_options(answer, tuple(DIRECTIONS), rng)
    return Question("direction", f"In which direction does the {name} move?", answer, options)


def existence(
    scene: ClipScene, names: tuple[str, ...], rng: np.random.Generator
) -> Question | None:
    """Is there an X at any time? Half yes."""
    present = [thing.name for thing in scene.picture.things]
    absent = [name for name in names if name not in present]
    is_shown = bool(rng.random() < 0.5) or not absent
    if not present:
        return None
    name = str(rng.choice(present if is_shown else absent))
    order = ("yes", "no") if rng.random() < 0.5 else ("no", "yes")
    text = f"Is there {article(name)} at any time?"
    return Question("existence", text, "yes" if is_shown else "no", order)


def camera(scene: ClipScene, names: tuple[str, ...], rng: np.random.Generator) -> Question | None:
    """What does the camera do? For cameras that move."""
    if scene.camera == STILL:
        return None
    options = draw_options(scene.camera, CAMERAS, rng)
    return Question("camera", "What does the camera do?", scene.camera, options)


CLIP_FAMILIES: dict[str, Asker] = {
    "appears": appears,
    "leaves": leaves,
    "moment": moment,
    "first": first,
    "direction": direction,
    "existence": existence,
    "camera": camera,
}


@dataclass(frozen=True)
class ClipItem(QueryFields):
    """One question with its clip; frames are composed when they are needed."""

    id: str
    scene: ClipScene
    query: Question
    library: Library

    @cached_property
    def evidence(self) -> frozenset[int]:
        """Frames that show the thing that is the answer; none where it is no thing."""
        names = [thing.name for thing in self.scene.picture.things]
        if self.answer not in names:
            return frozenset()
        return frozenset(self.scene.seen(names.index(self.answer)))

    def write(self, path: Path, size: int) -> Path:
        """The clip as an mp4 of ``size`` × ``size`` px."""
        return encode_mp4(clip_frames(self.scene, self.library, size), path, fps=RATE)


def clip_item(
    library: Library, split: str, family: str, index: int, seconds: float = SECONDS
) -> ClipItem:
    """Item ``index`` of a family; splits have disjoint seeds and backgrounds.

    The photographs of things are the same in all splits.
    """
    for attempt in range(1000):
        rng = stream(split, "stamp clips", family, index, attempt)
        scene = sample_clip(rng, library, split, seconds)
        query = CLIP_FAMILIES[family](scene, library.names, rng)
        if query is not None:
            return ClipItem(f"{split}-{family}-{index:05d}", scene, query, library)
    raise RuntimeError(f"no clip of {seconds} s allows a {family!r} question.")


def clip_items(
    library: Library,
    split: str,
    per_family: int,
    families: tuple[str, ...] = tuple(CLIP_FAMILIES),
    seconds: float = SECONDS,
) -> Iterator[ClipItem]:
    """``per_family`` items of each family, family by family."""
    for family in families:
        for index in range(per_family):
            yield clip_item(library, split, family, index, seconds)


def write_questions(items: Iterator[ClipItem], folder: Path, size: int) -> Path:
    """Clips as mp4 files below `folder`, and `questions.jsonl` with lettered options."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    rows = []
    for one in items:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--photos", type=Path, default=TUXPAINT, help="folder of Tux Paint's data")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--per-family", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of a clip")
    parser.add_argument("--size", type=int, default=448, help="px of both sides, even")
    args = parser.parse_args()
    if args.size % 2 or args.seconds < SHORTEST:
        raise OptionError(
            f"--size {args.size} has to be even, and --seconds {args.seconds:g} at least "
            f"{SHORTEST:g}."
        )
    library = Photos(args.photos)
    items = clip_items(library, args.split, args.per_family, seconds=args.seconds)
    print(write_questions(items, args.out, args.size))


if __name__ == "__main__":
    with one_message():
        main()
