"""Shared by the studies of trained methods: arguments, baselines, and the stored tables."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.trained_page import Rivals, compared, markdown, records
from benchmarks.publishing import environment
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import OptionError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.batches import Around
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import DOWNSCALE, FULL, Setting
from tokencomp.inputs.questions import Example
from tokencomp.reducers.base import Reducer
from tokencomp.storage import write_text
from tokencomp.training.measure import Measurement

REFERENCE = f"{FULL}@0"
"""Label of the uncompressed model's answers."""
PER_QUESTION = "a subset per question"
CARD = ("kind", "model_id", "data", "config", "seconds", "held_out", "spans")


def parser(doc: str | None, sets: Iterable[str]) -> argparse.ArgumentParser:
    """Arguments of every study."""
    shared = publishing.parser(doc, ACCURACY, "--output")
    shared.add_argument("--model", default="tiny-qwen2-vl")
    shared.add_argument("--weights", help="trained part; default: beside the model")
    shared.add_argument("--items", type=int, default=300, help="questions per set")
    shared.add_argument("--batch", type=int, default=30)
    shared.add_argument("--split", default="test", choices=("validation", "test"))
    shared.add_argument("--device", default="auto")
    shared.add_argument("--sets", nargs="+", choices=list(sets), default=list(sets))
    shared.set_defaults(every=list(sets))
    return shared


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


class StudyTables:
    """Tables and packed answers of one study, by question set.

    Sets that are not run again stay as they are.

    Parameters
    ----------
    name
        Of the files: `name`.json (tables and packed answers), `name`.md (page), `name`.csv.
    args
        From `parser`.
    rivals
        With which other methods a method is compared, answer by answer.

    Attributes
    ----------
    sets
        The sets to run.

    Raises
    ------
    OptionError
        The stored tables are of another model or split, or the checkout has uncommitted changes.
    """

    def __init__(self, name: str, args: argparse.Namespace, rivals: Rivals) -> None:
        self.name, self.args, self.rivals = name, args, rivals
        self.tables: dict[str, Any] = {}
        self.answers: dict[str, PackedAnswers] = {}
        self.sets = [] if args.report else args.sets
        self.facts: dict[str, Any] = {}
        if self.sets:
            self.facts = publishing.published_from(args.output, args.allow_dirty)
        if args.output.joinpath(f"{name}.json").exists():
            self._read()

    def _read(self) -> None:
        file, args = self.args.output / f"{self.name}.json", self.args
        self.tables = publishing.read(file)["tables"]
        if self.sets:  # drop sets that the script no longer has
            self.tables = {n: t for n, t in self.tables.items() if n in args.every}
        for title, table in self.tables.items():
            self.answers[title] = PackedAnswers.from_json(table.pop("answers"))
            wrong = [k for k in ("model", "split") if table[k] != getattr(args, k)]
            if wrong and self.sets and title not in self.sets:
                differences = ", ".join(
                    f"{k} {table[k]!r} instead of {getattr(args, k)!r}" for k in wrong
                )
                raise OptionError(
                    f"{file}: the table {title!r} has {differences}, and one page shows one of "
                    "each. Run all --sets again, or give another --output."
                )

    def add(
        self,
        title: str,
        rows: list[dict[str, Any]],
        runs: Mapping[str, EvalRun],
        cards: dict[str, Path],
        **more: Any,
    ) -> None:
        """Put in the rows and answers of one set, measured with the weights that `cards` describe.

        Parameters
        ----------
        runs
            Of `Measurement`, by key.
        """
        script = Path(sys.argv[0]).stem
        own = getattr(self.args, "weights", None)  # a place on one machine
        words = ["FOLDER" if own and word == own else word for word in sys.argv[1:]]
        command = ["python", "-m", f"benchmarks.accuracy.studies.{script}", *words]
        answers = PackedAnswers.of(runs, REFERENCE)
        contents = {k: json.loads(path.read_text()) for k, path in cards.items()}
        self.tables[title] = {
            "model": self.args.model,
            "split": self.args.split,
            "families": list(dict.fromkeys(answers.questions.families)),
            "provenance": {
                **environment(),
                "command": shlex.join(command),
                "random": PER_QUESTION,
                **self.facts,
            },
            "trained": {n: {k: card.get(k) for k in CARD} for n, card in contents.items()},
            "rows": rows,
            **more,
        }
        self.answers[title] = answers

    def write(self, notes: str = "") -> None:
        """The page with `notes` below its table, its CSV file, and new results."""
        for title, table in self.tables.items():
            table["rows"] = compared(table["rows"], self.answers[title], self.rivals)
        page = markdown(self.name, self.tables, notes)
        stored = {t: {**v, "answers": self.answers[t].to_json()} for t, v in self.tables.items()}
        folder = self.args.output
        if self.sets:  # stored results keep the names under which they were measured
            publishing.write(folder / f"{self.name}.json", {"tables": stored})
        write_text(folder / f"{self.name}.md", page)
        write_text(folder / f"{self.name}.csv", publishing.csv_text(records(self.tables)))
        print(page)
