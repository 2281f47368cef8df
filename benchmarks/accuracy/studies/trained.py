"""Shared by the studies of trained methods: baselines, the stored tables, the command line."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.trained_page import Rivals, compared, markdown, records
from benchmarks.experiment import Files, add_option, write
from benchmarks.publishing import environment
from tokencomp.adapters.registry import adapter_for
from tokencomp.cli import one_message
from tokencomp.errors import OptionError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.batches import Around
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import DOWNSCALE, FULL, Setting
from tokencomp.inputs.questions import Example
from tokencomp.reducers.base import Reducer
from tokencomp.training.measure import Measurement

REFERENCE = f"{FULL}@0"
"""Label of the uncompressed model's answers."""
PER_QUESTION = "a subset per question"
CARD = ("kind", "model_id", "data", "config", "seconds", "held_out", "spans")


MODEL = "tiny-qwen2-vl"
OPTIONS = {
    "model": MODEL,
    "weights": (None, "trained part; default: beside the model"),
    "items": (300, "questions per set"),
    "batch": 30,
    "split": ("test", "", ("validation", "test")),
    "device": "auto",
}
"""Of every study."""


def named(
    name: str,
    ratio: float = 0.0,
    reducer: str | Reducer | None = None,
    options: dict[str, Any] | None = None,
    variant: str = "",
) -> Setting:
    """A setting by the name of its row; without a reducer, the one that the row is named after."""
    method = (reducer or name) if ratio else FULL
    chosen = options if ratio and options else {}
    return Setting(method, ratio, chosen, name=name, variant=variant)


class Shrunk(Sequence[Example]):
    """Questions about media that give the processor fewer tokens."""

    def __init__(
        self, source: Sequence[Example], shrink: EqualTokens, ratio: float, frames: int
    ) -> None:
        self.source, self.shrink, self.ratio, self.frames = source, shrink, ratio, frames
        self.achieved: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        example, count = self.source[index], self.shrink.tokens
        media = example.load(self.frames)
        smaller = tuple(self.shrink.shrink(m, self.ratio) for m in media)
        self.achieved[index] = 1 - sum(map(count, smaller)) / sum(map(count, media))
        return replace(example, media=smaller)


def measure(
    models: dict[str, Any],
    processor: Any,
    source: Sequence[Example],
    methods: Sequence[Setting],
    title: str,
    batch: int,
    frames: int = 8,
    smaller: Sequence[str] = (DOWNSCALE,),
    around: Around | None = None,
) -> tuple[Measurement, list[Setting]]:
    """Answers of all methods, of uniform choice, and on smaller media at the same ratios.

    Parameters
    ----------
    models
        Variants by name, see `Measurement`.
    smaller
        Input baselines, see `EqualTokens`.
    around
        See `sweep`.

    Returns
    -------
    Measurement, list of Setting
        The answers, and all methods that were run, by ratio.
    """
    ratios = sorted({w.ratio for w in methods if w.ratio})
    every = [*methods, *(named("uniform", r, "uniform") for r in ratios)]
    measured = Measurement(models, processor, frames, batch, around=around)
    measured.run(source, every, title)
    for name in smaller:
        shrink = EqualTokens(processor, list(adapter_for(models[""]).placeholders), name)
        for way in (named(name, r) for r in ratios):
            fewer = Shrunk(source, shrink, way.ratio, frames)
            alone = Measurement({"": models[""]}, processor, frames, batch)
            alone.run(fewer, [], f"{title}, {way.key}")
            measured.runs[way.key] = with_ratios(alone.runs[REFERENCE], fewer.achieved)
            every.append(way)
    return measured, sorted(every, key=lambda w: w.ratio)


def with_ratios(run: EvalRun, ratios: Mapping[int, float]) -> EvalRun:
    """The uncompressed answers on smaller media, at the ratio of every question's media.

    Tables leave out how many tokens a layer sees: the ratio is one of the input.
    """
    rows = [{**r, "ratio": ratios[i]} for i, r in enumerate(run.records)]
    return replace(run, records=[{k: v for k, v in r.items() if k != "per_layer"} for r in rows])


Found = tuple[str, list[dict[str, Any]], Mapping[str, EvalRun], dict[str, Path]]
"""Title of a question set, rows, runs of `Measurement` by key, cards of the measured weights."""


@dataclass(frozen=True)
class Study:
    """Tables and packed answers of one study, by question set: NAME.json, NAME.md, NAME.csv.

    Attributes
    ----------
    name
        Of the files, in which "{model}" stands for the model.
    sets
        Titles of the question sets; those that are not run again stay as they are.
    measure
        From the command line, whose `sets` are to run, to what was found, set by set.
    rivals
        With which other methods a method is compared, answer by answer.
    notes
        Below the table of the page.
    options
        As in `Experiment`.
    """

    name: str
    sets: Mapping[str, Any]
    measure: Callable[[argparse.Namespace], Iterator[Found]]
    rivals: Rivals
    notes: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def files(self, model: str = MODEL, folder: Path = ACCURACY) -> Files:
        """The page and its CSV file."""
        name, tables = self.name.format(model=model), self._read(model, folder)
        for table in tables.values():
            answers = PackedAnswers.from_json(table.pop("answers"))
            table["rows"] = compared(table["rows"], answers, self.rivals)
        data = publishing.csv_text(records(tables))
        return {
            folder / f"{name}.md": markdown(name, tables, self.notes),
            folder / f"{name}.csv": data,
        }

    def main(self, doc: str | None) -> None:
        """Run the chosen sets and write the page, or with `--report` the page alone.

        Raises
        ------
        OptionError
            The stored tables are of another model or split.
        """
        with one_message():
            args = self._parser(doc).parse_args()
            if not args.report:
                facts = publishing.published_from(args.output, args.allow_dirty)
                tables = self._others(args)
                path = args.output / f"{self.name.format(model=args.model)}.json"
                for title, *found in self.measure(args):
                    tables[title] = _table(args, facts, *found)
                    publishing.write(path, {"tables": tables})
            write(self.files(args.model, args.output))

    def _parser(self, doc: str | None) -> argparse.ArgumentParser:
        shared = publishing.parser(doc, ACCURACY, "--output")
        every = list(self.sets)
        for name, given in {**OPTIONS, **self.options, "sets": (every, "", every)}.items():
            add_option(shared, name, *(given if isinstance(given, tuple) else (given,)))
        return shared

    def _read(self, model: str, folder: Path) -> dict[str, Any]:
        path = folder / f"{self.name.format(model=model)}.json"
        return dict(publishing.read(path)["tables"]) if path.exists() else {}

    def _others(self, args: argparse.Namespace) -> dict[str, Any]:
        """Stored tables, without sets that the study no longer has."""
        stored = self._read(args.model, args.output)
        tables = {title: table for title, table in stored.items() if title in self.sets}
        for title, table in tables.items():
            wrong = [k for k in ("model", "split") if table[k] != getattr(args, k)]
            if wrong and title not in args.sets:
                differences = ", ".join(
                    f"{k} {table[k]!r} instead of {getattr(args, k)!r}" for k in wrong
                )
                raise OptionError(
                    f"the stored table {title!r} has {differences}, and one page shows one of "
                    "each. Run all --sets again, or give another --output."
                )
        return tables


def _table(
    args: argparse.Namespace,
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
    runs: Mapping[str, EvalRun],
    cards: dict[str, Path],
) -> dict[str, Any]:
    """What is stored of one set, measured with the weights that `cards` describe."""
    script = Path(sys.argv[0]).stem
    words = [  # where weights lie is a fact of one machine
        "FOLDER" if args.weights and word == args.weights else word for word in sys.argv[1:]
    ]
    command = ["python", "-m", f"benchmarks.accuracy.studies.{script}", *words]
    answers = PackedAnswers.of(runs, REFERENCE)
    contents = {k: json.loads(path.read_text()) for k, path in cards.items()}
    made = {**environment(), "command": shlex.join(command), "random": PER_QUESTION, **facts}
    return {
        "model": args.model,
        "split": args.split,
        "families": list(dict.fromkeys(answers.questions.families)),
        "provenance": made,
        "trained": {n: {k: card.get(k) for k in CARD} for n, card in contents.items()},
        "rows": rows,
        "answers": answers.to_json(),
    }
