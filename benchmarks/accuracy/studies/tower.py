"""Patches dropped before the vision tower: accuracy, against fewer pixels at the same tower work.

    python -m benchmarks.accuracy.studies.tower                       # what is missing of all sets
    python -m benchmarks.accuracy.studies.tower --sets qwen-images --again
    python -m benchmarks.accuracy.studies.tower --rows kcenter --again # after a change of a method
    python -m benchmarks.accuracy.studies.tower --report              # only rebuilds the page

writes tower.json (which questions every row answers correctly, and provenance) and tower.md. All
rows leave the decoder the same share of the tokens of the full input: what differs is what the
vision tower saw. "entry only" is the ceiling, in which it sees everything. Media with fewer pixels
or frames give the tower as few patches as the tower stage leaves, and the decoder then drops the
rest of its own share. Answers are stored as soon as they exist, in an ignored folder, and a run
that stops goes on where it was. Rows that are stored for other weights of a model are answered
again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies import tower_book
from benchmarks.accuracy.studies.tower_book import CEILING, FULL, IDENTITY, ORDER, row_of
from benchmarks.accuracy.studies.tower_page import ENTRY, RATIO, TOWER, distances, page, records
from benchmarks.accuracy.studies.tower_sizes import at_side
from benchmarks.accuracy.studies.trained import Shrunk
from benchmarks.experiment import Files, write
from benchmarks.publishing import environment
from recipes.tiny.evaluate import blind_guess
from tokencomp.adapters.registry import adapter_for
from tokencomp.cli import one_message
from tokencomp.errors import OptionError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import DOWNSCALE, FEWER_FRAMES, Setting
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.questions import Example
from tokencomp.trained.cards import weights_hash
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items

IMAGES = ("attribute", "existence", "count", "small_object")
VIDEOS = ("needle", "video_existence")
DEEP_IMAGES = (*IMAGES, "position", "reading")
DEEP_VIDEOS = (*VIDEOS, "order", "direction", "action_count")
QWEN3, QWEN = "tiny-qwen3-vl", "tiny-qwen2-vl"
ONEVISION, VILA = "tiny-llava-onevision", "tiny-vila"
SIDES = {ONEVISION: (144, 128, 96), VILA: (192, 160, 128)}
"""Pixels per side of smaller pictures, for towers that take pictures of one size."""
STILLS = ("kcenter", "random", "uniform")
CLIPS = ("kcenter", "runlength", "random", "uniform")
SINGLE = tuple(name for name in CLIPS if name != "runlength")  # sees frames one by one there
BOTH = (DOWNSCALE, FEWER_FRAMES)


@dataclass(frozen=True)
class QuestionSet:
    """Questions for one model, and the rows of its table.

    Attributes
    ----------
    per_family
        Questions of every family.
    reducers
        Methods in the tower.
    smaller
        Input baselines.
    """

    model: str
    families: tuple[str, ...]
    per_family: int = 30
    reducers: tuple[str, ...] = STILLS
    smaller: tuple[str, ...] = (DOWNSCALE,)
    difficulty: str = "usual"


SETS = {
    "qwen3-images": QuestionSet(QWEN3, DEEP_IMAGES, 60),
    "qwen3-videos": QuestionSet(QWEN3, DEEP_VIDEOS, 40, CLIPS, BOTH),
    "qwen3-hard-videos": QuestionSet(QWEN3, VIDEOS, 30, CLIPS, BOTH, "hard"),
    "qwen-images": QuestionSet(QWEN, IMAGES, 60),
    "qwen-videos": QuestionSet(QWEN, VIDEOS, 60, CLIPS, BOTH),
    "qwen-hard-videos": QuestionSet(QWEN, VIDEOS, 30, CLIPS, BOTH, "hard"),
    "onevision-images": QuestionSet(ONEVISION, IMAGES),
    "onevision-videos": QuestionSet(ONEVISION, VIDEOS, 30, SINGLE, BOTH),
    "onevision-hard-videos": QuestionSet(ONEVISION, VIDEOS, 30, SINGLE, BOTH, "hard"),
    "vila-images": QuestionSet(VILA, IMAGES),
    "vila-videos": QuestionSet(VILA, VIDEOS, 30, SINGLE, BOTH),
}


def settings(reducers: Sequence[str]) -> dict[str, Setting]:
    """Rows on whole media, by name and tower ratio."""
    rows = {"full@0": Setting(), "entry only@0": Setting(ENTRY, RATIO)}
    rows["random at entry@0"] = Setting("random", RATIO)
    for reducer in reducers:
        for tower in TOWER:
            options = {"tower_ratio": tower, "tower_reducer": reducer}
            rows[f"{reducer}@{tower:g}"] = Setting(ENTRY, RATIO, options, name=f"{reducer} {tower}")
    return rows


class Questions:
    """The questions of a set: examples, and what the page says of them."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.set = SETS[name]
        self.options = {"batch_size": args.batch, "progress": name, "name": self.set.model}
        count = args.per_family or self.set.per_family
        chosen = list(items(args.split, count, self.set.families, difficulty=self.set.difficulty))
        self.source = shapesqa(chosen, ACCURACY / "results" / "media" / args.split)
        self.model, self.processor = load_model(self.set.model, device="cpu")
        weights = weights_hash(self.model)
        self.folder = ACCURACY / "runs" / "tower" / f"{args.split}-{name}-{weights}"
        pan = self.set.difficulty == "hard" and chosen[0].kind == "video"
        self.facts = {
            "model": self.set.model, "weights": weights, "split": args.split,
            "blind": blind_guess(chosen),
            "vivid": [int(bool(i.scene.look and i.scene.look.vivid)) for i in chosen if pan],
        }  # fmt: skip

    def is_in(self, entry: dict[str, Any]) -> bool:
        """Whether the stored rows of `entry` are answers of this model to these questions."""
        ids = tuple(example.id for example in self.source)
        same = all(entry.get(name) == self.facts[name] for name in IDENTITY)
        return same and entry["answers"].questions.ids == ids

    def rows(self, done: Sequence[str], names: Sequence[str]) -> Iterator[PackedAnswers]:
        """Answers of the rows called `names` that are not among `done`, some rows at a time.

        The rows that others are compared with are answered in any case.
        """
        whole = {
            key: setting
            for key, setting in settings(self.set.reducers).items()
            if key not in done and (row_of(key) in names or key in (FULL, CEILING))
        }
        if whole:  # in one go, because every video is decoded once for all rows
            chosen = list(whole.values())
            runs = sweep(
                self.model, self.processor, self.source, chosen, self.folder, **self.options
            )
            yield _packed({key: runs[setting] for key, setting in whole.items()})
        for kind in (kind for kind in self.set.smaller if kind in names):
            if kind == DOWNSCALE and self.set.model in SIDES:
                yield from self._smaller_towers(done)
            else:
                yield from self._smaller_media(kind, done)

    def _smaller_media(self, kind: str, done: Sequence[str]) -> Iterator[PackedAnswers]:
        ids = list(adapter_for(self.model).placeholders)
        shrink = EqualTokens(self.processor, ids, kind)
        for tower in TOWER:
            fewer: Any = Shrunk(self.source, shrink, tower, 8)
            examples: list[Example] = [fewer[i] for i in range(len(self.source))]
            achieved = sum(fewer.achieved.values()) / len(fewer.achieved)
            key = f"{kind}@{achieved:.3g}"
            if key not in done:
                yield self._reduced(key, self.model, self.processor, examples, achieved)

    def _smaller_towers(self, done: Sequence[str]) -> Iterator[PackedAnswers]:
        ids = list(adapter_for(self.model).placeholders)
        media = self.source[0].load(8)[0]
        full = EqualTokens(self.processor, ids, DOWNSCALE).tokens(media)
        for side in SIDES[self.set.model]:
            achieved = 1 - (side / self.model.config.vision_config.image_size) ** 2
            if (key := f"{DOWNSCALE}@{achieved:.3g}") in done:
                continue
            model, processor = at_side(self.set.model, side)
            tokens = EqualTokens(processor, ids, DOWNSCALE).tokens(media)
            yield self._reduced(key, model, processor, self.source, 1 - tokens / full)

    def _reduced(
        self, key: str, model: Any, processor: Any, examples: Sequence[Example], achieved: float
    ) -> PackedAnswers:
        """Answers about media of fewer tokens, of which the decoder drops the rest."""
        ratio = max(0.0, 1 - (1 - RATIO) / (1 - achieved))
        setting = Setting(ENTRY, ratio) if ratio > 0.01 else Setting()
        runs = sweep(model, processor, examples, [setting], self.folder / key, **self.options)
        return _packed({key: runs[setting]})


def _packed(runs: dict[str, EvalRun]) -> PackedAnswers:
    """The answers of rows by their keys.

    Raises
    ------
    OptionError
        A question was not answered, for instance because its file is damaged.
    """
    for key, run in runs.items():
        if run.failed:
            first = run.failed[0]
            raise OptionError(f"{key}: {first['id']} was not answered ({first['error']}).")
    return PackedAnswers.of(runs, None)


def run_set(name: str, args: argparse.Namespace, sets: tower_book.Sets, path: Path) -> None:
    """Answer the rows of a set that `sets` lacks, and write them to `path`."""
    facts = publishing.published_from(args.output, args.allow_dirty)
    questions = Questions(name, args)
    if args.again:
        shutil.rmtree(questions.folder, ignore_errors=True)
    entry = sets.get(name, {})
    if not entry or not questions.is_in(entry):
        entry = questions.facts
    stored = entry["answers"].correct if "answers" in entry else ()
    done = [key for key in stored if not (args.again and row_of(key) in args.rows)]
    for rows in questions.rows(done, args.rows):
        entry = tower_book.with_rows(entry, rows, {**environment(), **facts})
        sets[name] = entry
        tower_book.write(path, sets)


def main() -> None:
    parser = publishing.parser(__doc__, ACCURACY, "--output")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument(
        "--per-family", type=int, help="questions per family; default: those of the page"
    )
    parser.add_argument("--batch", type=int, default=30)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--rows", nargs="+", choices=ORDER, default=list(ORDER), help="row names")
    parser.add_argument("--again", action="store_true", help="answer stored rows again")
    args = parser.parse_args()
    path = args.output / "tower.json"
    sets = tower_book.read(path)
    for name in () if args.report else args.sets:
        run_set(name, args, sets, path)
    write(files(args.output))


def files(folder: Path = ACCURACY) -> Files:
    """tower.md, tower.csv and, where its answers are stored, tower_distance.csv."""
    stored = tower_book.read(folder / "tower.json")
    sets = {name: stored[name] for name in SETS if name in stored}
    section, rows = distances(folder / tower_book.DISTANCE)
    found = {
        folder / "tower.md": "\n".join(filter(None, [page(sets), section])),
        folder / "tower.csv": publishing.csv_text(records(sets)),
    }
    return found | ({folder / "tower_distance.csv": publishing.csv_text(rows)} if rows else {})


if __name__ == "__main__":
    with one_message():
        main()
