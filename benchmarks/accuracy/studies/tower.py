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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import publishing
from benchmarks.accuracy import packed
from benchmarks.accuracy.packed import PackedAnswers, pack, unpack
from benchmarks.accuracy.store import ACCURACY
from benchmarks.experiment import Files, write
from benchmarks.publishing import TABLES, environment
from recipes.tiny.evaluate import blind_guess
from tokencomp.adapters.registry import adapter_for
from tokencomp.cli import one_message
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.metrics import difference, retention
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import DOWNSCALE, FEWER_FRAMES, Setting
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.questions import Example
from tokencomp.trained.cards import weights_hash
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items

DISTANCE = "tower_distance.json"
"""Answers from which the weights of contrast and change were chosen, once."""
FULL, CEILING = "full@0", "entry only@0"
CHOSEN = ("kcenter", "runlength", "keyframes", "random", "uniform")
"""Methods in the tower; keyframes has stored rows alone, see the head of the page."""
SMALLER = (DOWNSCALE, FEWER_FRAMES)
ORDER = ("full", "entry only", "random at entry", *CHOSEN, *SMALLER)
"""Rows of a table, from top to bottom."""
IDENTITY = ("model", "weights", "split", "blind", "vivid")
"""What all rows of a set share."""

Sets = dict[str, dict[str, Any]]


def read_sets(path: Path) -> Sets:
    """All sets in the file; none if it does not exist.

    Returns
    -------
    dict
        `answers` of every set is `PackedAnswers`, and `vivid` says for every question whether its
        background has the colours of objects: a list of 0 and 1, empty where none has.
    """
    if not path.exists():
        return {}
    sets = packed.read_sets(publishing.read(path)["sets"])
    for entry in sets.values():
        count = len(entry["answers"].questions)
        entry["vivid"] = unpack(entry["vivid"], count) if entry["vivid"] else []
    return sets


def write_sets(path: Path, sets: Sets) -> None:
    """Write all sets: what their rows share, provenance, and answers by "NAME@TOWER RATIO"."""
    stored = packed.stored_sets(sets)
    for entry in stored.values():
        entry["vivid"] = pack(entry["vivid"]) if entry["vivid"] else ""
    publishing.write(path, {"sets": stored})


def with_rows(entry: dict[str, Any], rows: PackedAnswers, facts: dict[str, Any]) -> dict[str, Any]:
    """The set with more rows, in the order of its table.

    Parameters
    ----------
    facts
        Provenance of the new rows.
    """
    answers = entry["answers"].joined(rows) if "answers" in entry else rows
    keys = sorted(
        answers.correct, key=lambda key: (ORDER.index(row_of(key)), float(key.rpartition("@")[2]))
    )
    return {
        **entry,
        "commits": sorted({*entry.get("commits", ()), str(facts.get("commit"))}),
        "provenance": facts,
        "answers": PackedAnswers(answers.questions, {k: answers.correct[k] for k in keys}),
    }


def row_of(key: str) -> str:
    """The name in the key of a row."""
    return key.rpartition("@")[0]


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
            yield PackedAnswers.of({key: runs[setting] for key, setting in whole.items()}, None)
        for kind in (kind for kind in self.set.smaller if kind in names):
            if kind == DOWNSCALE and self.set.model in SIDES:
                yield from self._smaller_towers(done)
            else:
                yield from self._smaller_media(kind, done)

    def _smaller_media(self, kind: str, done: Sequence[str]) -> Iterator[PackedAnswers]:
        ids = list(adapter_for(self.model).placeholders)
        shrink = EqualTokens(self.processor, ids, kind)
        for tower in TOWER:
            examples, reached = [], []
            for example in self.source:
                media = example.load(8)
                smaller = tuple(shrink.shrink(one, tower) for one in media)
                count, less = (sum(map(shrink.tokens, some)) for some in (media, smaller))
                examples.append(replace(example, media=smaller))
                reached.append(1 - less / count)
            achieved = sum(reached) / len(reached)
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
        return PackedAnswers.of({key: runs[setting]}, None)


def run_set(name: str, args: argparse.Namespace, sets: Sets, path: Path) -> None:
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
        entry = with_rows(entry, rows, {**environment(), **facts})
        sets[name] = entry
        write_sets(path, sets)


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
    sets = read_sets(path)
    for name in () if args.report else args.sets:
        run_set(name, args, sets, path)
    write(files(args.output))


def files(folder: Path = ACCURACY) -> Files:
    """The page and its tables."""
    stored = read_sets(folder / "tower.json")
    sets = {name: stored[name] for name in SETS if name in stored}
    section, rows = distances(folder / DISTANCE)
    found = {
        folder / "tower.md": "\n".join(filter(None, [page(sets), section])),
        folder / "tower.csv": publishing.csv_text(records(sets)),
    }
    return found | ({folder / "tower_distance.csv": publishing.csv_text(rows)} if rows else {})


RATIO, ENTRY = 0.75, "condiv"
TOWER = (0.5, 0.6, 0.75)
PREAMBLE = f"""Share of the right answers that k-center in the vision tower keeps, in brackets the
paired 95 % interval: 100 % is the same decoder ratio ({RATIO}, `{ENTRY}`) with a tower that sees
all patches. `downscale` gives the tower fewer pixels instead, at about the same tower ratio:
smaller media where the tower takes any size, else a tower with interpolated position embeddings
(LLaVA-OneVision, VILA). Test questions of ShapesQA on the embedded models, whose towers have three
to eight blocks. The usual videos have a fixed camera and objects that differ in colour from the
background, which favours scores on pixels; hard videos pan, with noise in every frame, and half of
them have textures in the colours of objects. No percentage here carries over to other models.
[Every method, tower ratio and question family]({TABLES}); `keyframes`, which chose whole frames
by thumbnails, is no longer part of tokencomp. [Methods](METHODS.md)."""
DISTANCES = """Validation questions: share of the right answers of a full tower at the entry ratio
that k-center keeps, by the weights of contrast and change (`std_weight`, `temporal_weight`; 0, 0
compares average colours alone). The default is 1, 1, which has the largest mean at 0.75. The
decoder used condiv of that time (power 1.0). [By question family](../README.md#tables-as-csv)."""


def page(sets: Sets) -> str:
    """The page of all sets."""
    head = ["questions", "n", "full model", "full tower", *(f"k-center, {t:g}" for t in TOWER)]
    rows = [_line(name, entry) for name, entry in sets.items()]
    made = [f"- {n}: {publishing.provenance(entry['provenance'])}" for n, entry in sets.items()]
    parts = [
        "# What does dropping patches before the vision tower cost in accuracy?",
        "`python -m benchmarks.accuracy.studies.tower`",
        publishing.table([*head, f"random, {TOWER[0]:g}", f"downscale, about {TOWER[0]:g}"], rows),
        PREAMBLE,
    ]
    return "\n\n".join([*parts, "## Runs", "\n".join(made)]) + "\n"


def _line(name: str, entry: dict[str, Any]) -> list[str]:
    answers = entry["answers"].correct
    ceiling = answers[CEILING]
    keys = [f"kcenter@{t:g}" for t in TOWER]
    kept = [str(retention(answers[key], ceiling)) if key in answers else "–" for key in keys]
    smaller = [key for key in answers if key.startswith(f"{SMALLER[0]}@")]
    nearest = min(smaller, key=lambda key: abs(float(key.partition("@")[2]) - TOWER[0]), default="")
    for key in (f"random@{TOWER[0]:g}", nearest):
        kept.append(f"{_mean(answers[key]) / _mean(ceiling):.1%}" if key in answers else "–")
    shares = [f"{_mean(answers[key]):.1%}" for key in (FULL, CEILING)]
    return [name, str(len(ceiling)), *shares, *kept]


def records(sets: Sets) -> list[dict[str, Any]]:
    """The rows of the CSV file: every method and tower ratio, also by question family."""
    rows = []
    for name, entry in sets.items():
        answers = entry["answers"].correct
        for key, values in answers.items():
            method, _, tower = key.rpartition("@")
            kept, gap = (f(values, answers[CEILING]) for f in (retention, difference))
            rows.append(
                {
                    "set": name,
                    "model": entry["model"],
                    "method": method,
                    "tower_ratio": float(tower),
                    "accuracy": _mean(values),
                    "kept_of_full": _mean(values) / _mean(answers[FULL]),
                    "kept_of_full_tower": kept.value,
                    "kept_low": kept.low,
                    "kept_high": kept.high,
                    "minus_full_tower": gap.value,
                    "minus_low": gap.low,
                    "minus_high": gap.high,
                    **{f: _mean([values[i] for i in some]) for f, some in _groups(entry).items()},
                }
            )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _groups(entry: dict[str, Any]) -> dict[str, list[int]]:
    """Numbers of the questions of every column; hard videos also by their background."""
    families, vivid = entry["answers"].questions.families, entry["vivid"]
    groups = {f: [i for i, g in enumerate(families) if g == f] for f in dict.fromkeys(families)}
    if vivid:
        for mark, title in ((0, "panning"), (1, "panning, texture in colours of objects")):
            groups[title] = [i for i, v in enumerate(vivid) if v == mark]
    return {title: rows for title, rows in groups.items() if rows}


def distances(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """What k-center keeps with other distances, on validation questions: section and CSV rows."""
    if not path.exists():
        return "", []
    sets = packed.read_sets(publishing.read(path)["sets"])
    books = {name: entry["answers"] for name, entry in sets.items()}
    lines, rows = [], []
    for key in next(iter(books.values())).correct:
        weights, _, tower = key.partition("@")
        shares = [_mean(b.correct[key]) / _mean(b.correct[CEILING]) for b in books.values()]
        if key != CEILING:
            lines.append([weights, tower, *(f"{share:.1%}" for share in shares)])
        for name, book in books.items():
            groups = _groups({"answers": book, "vivid": []})
            families = {
                f: _mean([book.correct[key][i] for i in some]) for f, some in groups.items()
            }
            accuracy = {"accuracy": _mean(book.correct[key])}
            rows.append({"set": name, "weights": weights, "tower_ratio": float(tower)}
                        | accuracy | families)  # fmt: skip
    head = [
        "contrast, change",
        "tower ratio",
        *(f"{n} ({len(b.questions)})" for n, b in books.items()),
    ]
    table = publishing.table(head, lines)
    return f"## What k-center compares\n\n{table}\n\n{DISTANCES}\n", rows


def at_side(name: str, side: int) -> tuple[Any, Any]:
    """An embedded model and its processor, both for pictures of `side` × `side` pixels.

    Processors of LLaVA-OneVision and VILA enlarge every picture to the size of the tower, so that
    smaller media save nothing. Position embeddings are interpolated, as `interpolate_pos_encoding`
    of transformers does.

    Parameters
    ----------
    name
        "tiny-llava-onevision" or "tiny-vila".
    """
    model, processor = load_model(name, device="cpu")
    tower = adapter_for(model).tower
    embeddings: Any = next(m for m in tower.modules() if hasattr(m, "position_embedding"))
    before, patch = embeddings.image_size, embeddings.patch_size
    _interpolate(embeddings, before // patch, side // patch)
    embeddings.image_size = side
    for config in (model.config, getattr(processor, "config", None)):
        if config is not None:
            config.vision_config.image_size = side
    pixels = {"height": side, "width": side}
    processor.image_processor.size = pixels
    if hasattr(processor, "num_image_tokens"):
        processor.num_image_tokens = (side // patch) ** 2
        processor.video_processor.size = pixels
        for owner in (model.config, processor.image_processor):
            owner.image_grid_pinpoints = [
                [h * side // before, w * side // before] for h, w in owner.image_grid_pinpoints
            ]
    return model, processor


@torch.no_grad()
def _interpolate(embeddings: Any, before: int, after: int) -> None:
    """Give the embeddings positions for after × after patches."""
    old: Tensor = embeddings.position_embedding.weight
    grid = old.unflatten(0, (before, before)).permute(2, 0, 1)[None]
    grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic")
    new = nn.Embedding(after**2, old.shape[1])
    new.weight.copy_(grid[0].flatten(1).T)
    embeddings.position_embedding = new.to(old.dtype)
    embeddings.position_ids = torch.arange(after**2)[None]
    embeddings.num_patches = embeddings.num_positions = after**2


if __name__ == "__main__":
    with one_message():
        main()
