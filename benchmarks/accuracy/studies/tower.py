"""Patches dropped before the vision tower: accuracy, against fewer pixels at the same tower work.

    python -m benchmarks.accuracy.studies.tower                       # what is missing of all sets
    python -m benchmarks.accuracy.studies.tower --sets qwen-images --again
    python -m benchmarks.accuracy.studies.tower --report              # only rebuilds the page

writes tower.json (answers per question, provenance) and tower.md. All rows leave the decoder the
same share of the tokens of the full input: what differs is what the vision tower saw. "entry only"
is the ceiling, in which it sees everything. Media with fewer pixels or frames give the tower as few
patches as the tower stage leaves, and the decoder then drops the rest of its own share. Answers are
stored as soon as they exist, in an ignored folder, and a run that stops goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.library import (
    DOWNSCALE,
    FEWER_FRAMES,
    EqualTokens,
    Example,
    Setting,
    adapter_for,
    blind_guess,
    environment,
    items,
    load_model,
    one_message,
    shapesqa,
    sweep,
    write_json,
)
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.tower_page import ENTRY, RATIO, TOWER, page
from benchmarks.accuracy.studies.tower_sizes import at_side
from benchmarks.accuracy.studies.trained import Shrunk

IMAGES = ("attribute", "existence", "count", "small_object")
VIDEOS = ("needle", "video_existence")
QWEN, ONEVISION, VILA = "tiny-qwen2-vl", "tiny-llava-onevision", "tiny-vila"
SIDES = {ONEVISION: (144, 128, 96), VILA: (192, 160, 128)}
"""Pixels per side of smaller pictures, for towers that take pictures of one size."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions for one model, and the rows of its table."""

    model: str
    families: tuple[str, ...]
    reducers: tuple[str, ...] = ("kcentre", "random", "uniform")
    smaller: tuple[str, ...] = (DOWNSCALE,)
    difficulty: str = "usual"


CLIPS = ("kcentre", "runlength", "random", "uniform")
BOTH = (DOWNSCALE, FEWER_FRAMES)
SETS = {
    "qwen-images": QuestionSet(QWEN, IMAGES),
    "qwen-videos": QuestionSet(QWEN, VIDEOS, CLIPS, BOTH),
    "qwen-hard-videos": QuestionSet(QWEN, VIDEOS, CLIPS, BOTH, "hard"),
    "onevision-images": QuestionSet(ONEVISION, IMAGES),
    "onevision-videos": QuestionSet(ONEVISION, VIDEOS, smaller=BOTH),
    "onevision-hard-videos": QuestionSet(ONEVISION, VIDEOS, smaller=BOTH, difficulty="hard"),
    "vila-images": QuestionSet(VILA, IMAGES),
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


def right(run: Any, ids: Sequence[str]) -> str:
    """ "1" for every question that was answered rightly, in the order of `ids`; else "0"."""
    answers = {r["id"]: str(int(bool(r["correct"]))) for r in run.answered}
    return "".join(answers[name] for name in ids)


class Questions:
    """The questions of a set: examples, and what the page says of them."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.set = SETS[name]
        self.options = {"batch_size": args.batch, "progress": name, "name": self.set.model}
        self.folder = ACCURACY / "runs" / "tower" / f"{args.split}-{name}"
        count = args.items // len(self.set.families)
        chosen = list(items(args.split, count, self.set.families, difficulty=self.set.difficulty))
        self.source = shapesqa(chosen, ACCURACY / "results" / "media" / args.split)
        self.ids = [example.id for example in self.source]
        vivid = [bool(i.scene.look and i.scene.look.vivid) for i in chosen]
        pan = self.set.difficulty == "hard" and chosen[0].kind == "video"
        self.facts = {
            "model": self.set.model, "split": args.split, "families": list(self.set.families),
            "ids": self.ids, "blind": blind_guess(chosen),
            "vivid": "".join(str(int(v)) for v in vivid) if pan else "",
        }  # fmt: skip

    def rows(self, done: Sequence[str]) -> Iterator[dict[str, str]]:
        """Answers of the rows that are not among `done`, some rows at a time."""
        whole = {k: s for k, s in settings(self.set.reducers).items() if k not in done}
        model, processor = load_model(self.set.model, device="cpu")
        if whole:  # in one go, because every video is decoded once for all rows
            run = sweep(
                model, processor, self.source, list(whole.values()), self.folder, **self.options
            )
            yield {key: right(run[setting], self.ids) for key, setting in whole.items()}
        for kind in self.set.smaller:
            if kind == DOWNSCALE and self.set.model in SIDES:
                yield from self._smaller_towers(done)
            else:
                yield from self._smaller_media(model, processor, kind, done)

    def _smaller_media(
        self, model: Any, processor: Any, kind: str, done: Sequence[str]
    ) -> Iterator[dict[str, str]]:
        shrink = EqualTokens(processor, list(adapter_for(model).placeholder_ids()), kind)
        for tower in TOWER:
            fewer: Any = Shrunk(self.source, shrink, tower, 8)
            examples: list[Example] = [fewer[i] for i in range(len(self.source))]
            achieved = sum(fewer.achieved.values()) / len(fewer.achieved)
            key = f"{kind}@{achieved:.3g}"
            if key not in done:
                yield {key: self._reduced(key, model, processor, examples, achieved)}

    def _smaller_towers(self, done: Sequence[str]) -> Iterator[dict[str, str]]:
        sides = SIDES[self.set.model]
        plain, processor = load_model(self.set.model, device="cpu")
        ids = list(adapter_for(plain).placeholder_ids())
        media = self.source[0].load(8)[0]
        full = EqualTokens(processor, ids, DOWNSCALE).tokens(media)
        for side in sides:
            achieved = 1 - (side / plain.config.vision_config.image_size) ** 2
            if (key := f"{DOWNSCALE}@{achieved:.3g}") in done:
                continue
            model, processor = at_side(self.set.model, side)
            tokens = EqualTokens(processor, ids, DOWNSCALE).tokens(media)
            yield {key: self._reduced(key, model, processor, self.source, 1 - tokens / full)}

    def _reduced(
        self, key: str, model: Any, processor: Any, examples: Sequence[Example], achieved: float
    ) -> str:
        """Answers about media of fewer tokens, of which the decoder drops the rest."""
        ratio = max(0.0, 1 - (1 - RATIO) / (1 - achieved))
        setting = Setting(ENTRY, ratio) if ratio > 0.01 else Setting()
        runs = sweep(model, processor, examples, [setting], self.folder / key, **self.options)
        return right(runs[setting], self.ids)


def run_set(name: str, args: argparse.Namespace, book: dict[str, Any], path: Path) -> None:
    """Answer the rows of a set that `book` lacks, and write them to `path`."""
    facts = publishing.published_from(args.output, args.allow_dirty)
    questions = Questions(name, args)
    if args.again:
        shutil.rmtree(questions.folder, ignore_errors=True)
    entry = book["sets"].get(name, {})
    if args.again or any(entry.get(k) != v for k, v in questions.facts.items()):
        entry = {**questions.facts, "commits": [], "answers": {}}
    for rows in questions.rows(list(entry["answers"])):
        entry["answers"] |= rows
        entry["commits"] = sorted({*entry["commits"], str(facts.get("commit"))})
        entry["provenance"] = {**facts, **environment()}
        book["sets"][name] = entry
        write_json(path, book)


def main() -> None:
    parser = publishing.parser(__doc__, ACCURACY, "--output")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--items", type=int, default=120, help="questions per set")
    parser.add_argument("--batch", type=int, default=30)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--again", action="store_true", help="answer stored rows again")
    args = parser.parse_args()
    path = args.output / "tower.json"
    book = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sets": {}}
    for name in () if args.report else args.sets:
        run_set(name, args, book, path)
    book["sets"] = {name: book["sets"][name] for name in SETS if name in book["sets"]}
    (args.output / "tower.md").write_text(page(book), encoding="utf-8")


if __name__ == "__main__":
    with one_message():
        main()
