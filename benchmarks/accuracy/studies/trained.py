"""Shared by the studies of trained methods: baselines, the stored tables, the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.report import NONE, SLACK, table
from benchmarks.accuracy.store import ACCURACY
from benchmarks.experiment import Files, add_option, write
from benchmarks.publishing import MARK, TABLES, environment, provenance
from tokencomp.adapters.registry import adapter_for
from tokencomp.cli import one_message
from tokencomp.errors import OptionError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.batches import Around
from tokencomp.evaluation.metrics import difference, mcnemar
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import DOWNSCALE, FULL, Setting
from tokencomp.inputs.questions import Example
from tokencomp.reducers.base import Reducer
from tokencomp.training.measure import Measurement

Rivals = Mapping[str, tuple[str, ...]]
TITLES = {
    "adsc": "What does training an adapter for compression (ADSC) gain?",
    "selector": "Is the trained selector better than raw attention?",
    "selector_features": "What does a trained selector gain that servers can run?",
    "ccam": "Is the trained ccam projector better than pooling?",
    "long_video-tiny-qwen2-vl": "What helps with longer videos than in training? (M-RoPE)",
    "long_video-tiny-llava-onevision": "What helps with longer videos than in training? (1-D)",
}


def compared(
    rows: Sequence[dict[str, Any]], answers: PackedAnswers, rivals: Rivals
) -> list[dict[str, Any]]:
    """The rows, each with its comparisons at the same ratio.

    They are the exact McNemar tests against its rivals, what it answers where downscaling fails,
    and how often it gives the full model's answer.
    """
    result, correct = [], answers.correct
    reached = {row["ratio"] for row in rows if row["name"] == DOWNSCALE and reaches(row)}
    for row in rows:
        label, tests = key(row["name"], row["ratio"]), {}
        row = {**row, **agreement(answers, label)}
        if row["ratio"] in reached:
            row |= against_downscale(answers, label, key(DOWNSCALE, row["ratio"]))
        for rival in rivals.get(row["name"], ()):
            other = key(rival, row["ratio"])
            if other in correct:
                test = mcnemar(correct[label], correct[other])
                tests[rival] = {"wins": test.wins, "losses": test.losses, "p": test.p}
        result.append({**row, "against": tests} if tests else row)
    return result


def agreement(answers: PackedAnswers, label: str) -> dict[str, Any]:
    """The share of questions with the very answer of the full model."""
    same = answers.agrees.get(label)
    return {"agreement": sum(same) / len(same)} if same else {}


def against_downscale(answers: PackedAnswers, label: str, small: str) -> dict[str, Any]:
    """Difference to downscaling, and right answers where it fails, as (right, questions)."""
    if label not in answers.correct or small not in answers.correct or label == small:
        return {}
    ours, blurred = answers.correct[label], answers.correct[small]
    failures = [right for right, other in zip(ours, blurred, strict=True) if not other]
    gap = difference(ours, blurred)
    return {
        "vs_downscale": {"value": gap.value, "low": gap.low, "high": gap.high},
        "where_downscale_fails": [sum(failures), len(failures)],
    }


def reaches(row: dict[str, Any]) -> bool:
    """Whether smaller media give the processor as few tokens as the ratio says."""
    return bool(row["achieved_ratio"] >= row["ratio"] - SLACK)


def key(name: str, ratio: float) -> str:
    """The label of a method's answers, as `Setting.key` forms it."""
    return f"{name}@{ratio:g}"


def records(tables: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the CSV file; smaller pictures with too many tokens are no baseline."""
    rows = []
    for title, content in tables.items():
        for row in content["rows"]:
            right, count = row.get("where_downscale_fails", (0, 0))
            gap, ends = row.get("vs_downscale", {}), row.get("interval") or (None, None)
            shown = {
                "accuracy": row["accuracy"],
                "retention": row.get("retention"),
                **dict(zip(("retention_low", "retention_high"), ends, strict=True)),
                "vs_downscale": gap.get("value"),
                **{f"vs_downscale_{end}": gap.get(end) for end in ("low", "high")},
                "where_downscale_fails": right / count if count else None,
                "same_answer": row.get("agreement"),
                "p_random": row.get("vs_random", {}).get("p"),
            }
            for rival, test in row.get("against", {}).items():
                shown |= {f"{part}_{rival}": test[part] for part in ("wins", "losses", "p")}
            if row["name"] == DOWNSCALE and not reaches(row):
                shown = {}
            asked = {"set": title, "method": row["name"], "ratio": row["ratio"]}
            rows.append({**asked, "achieved_ratio": row.get("achieved_ratio"), **shown})
    return rows


def overview(tables: dict[str, Any]) -> str:
    """Retention by method, set and ratio; of the full model its accuracy."""
    every = records(tables)
    columns = list(dict.fromkeys((r["set"], r["ratio"]) for r in every if r["ratio"]))
    names = dict.fromkeys(r["method"] for r in every if r["ratio"])
    found = {(r["method"], r["set"], r["ratio"]): r.get("retention") for r in every}
    rows = []
    for name in names:
        values = [found.get((name, *column)) for column in columns]
        rows.append([name, *(NONE if v is None else f"{v:.1%}" for v in values)])
    full = {r["set"]: r["accuracy"] for r in every if (r["method"], r["ratio"]) == (FULL, 0)}
    rows.append(["full model, accuracy", *(f"{full[title]:.1%}" for title, _ in columns)])
    return table(["accuracy kept", *(f"{title}, {ratio:.3g}" for title, ratio in columns)], rows)


def markdown(name: str, tables: dict[str, Any], notes: str = "") -> str:
    """The page: a table, what follows from it, and where every number comes from."""
    source = next(iter(tables.values()))
    intro = (
        f"{source['model']}, {source['split']} split of ShapesQA. Cells: accuracy divided by the "
        f"full model's on the same questions; columns: question set and ratio. `{DOWNSCALE}` is "
        "the full model on smaller media of as many tokens; –: not measured, or not reachable. "
        f"[Intervals, paired tests and baselines]({TABLES}). [Methods](METHODS.md)."
    )
    if any("random" not in content["provenance"] for content in tables.values()):
        intro += " `random` uses one subset for all questions whose media have the same grid."
    made = []
    for title, content in tables.items():
        facts = content["provenance"]
        mark = "" if facts.get(MARK, True) else " **Not for publication: uncommitted changes.**"
        families = ", ".join(content["families"])
        made.append(f"- {title} ({families}): {provenance(facts)}.{mark}")
    parts = [f"# {TITLES.get(name, name)}", overview(tables), intro, *([notes] if notes else [])]
    parts += ["## Runs", "\n".join([*made, *training(tables)])]
    return "\n\n".join(parts) + "\n"


def training(tables: dict[str, Any]) -> list[str]:
    """How the measured weights were trained; of weights whose card is lost, what is known."""
    lines = []
    for content in tables.values():
        for name, card in content["trained"].items():
            if isinstance(card, str):
                text = card
            else:
                time = f"{card['seconds']:.0f} s" if card.get("seconds") else "time not recorded"
                text = f"`{training_command(card)}`{without_option(card)} ({time})"
            lines.append(f"- Training of {name}: {text}.")
    return list(dict.fromkeys(lines))


def training_command(card: dict[str, Any]) -> str:
    """Today's command line for a card, with all options, defaults included."""
    from typer.main import get_command

    from tokencomp.cli.train import app

    command: Any = get_command(app)
    parts = ["tokencomp", "train", card["kind"]]
    parts += ["--model", card["model_id"], "--data", card["data"]]
    for option in command.commands[card["kind"]].params:
        value = card["config"].get(option.name)
        if isinstance(value, bool):
            parts += (option.opts if value else option.secondary_opts)[:1]
        elif isinstance(value, dict):
            parts += [part for k, v in value.items() for part in (option.opts[0], f"{k}={v}")]
        elif value is not None:
            text = ",".join(value) if isinstance(value, list | tuple) else str(value)
            parts += [option.opts[0], text]
    return shlex.join([*parts, "--output", "FOLDER"])


def without_option(card: dict[str, Any]) -> str:
    """Fields of a card's config that differ from their defaults, and that no option sets."""
    from typer.main import get_command

    from tokencomp.cli.train import app
    from tokencomp.training.ccam import CcamConfig
    from tokencomp.training.selector.labels import SelectorConfig

    command: Any = get_command(app)
    options = {option.name for option in command.commands[card["kind"]].params}
    config: Any = {"ccam": CcamConfig, "selector": SelectorConfig}.get(card["kind"])
    fields = dataclasses.fields(config) if config else ()
    found = [
        f"{f.name}={card['config'][f.name]}"
        for f in fields
        if f.name in card["config"].keys() - options and card["config"][f.name] != f.default
    ]
    return f" with {', '.join(found)} of `{config.__name__}`" if found else ""


REFERENCE = f"{FULL}@0"
"""Label of the uncompressed model's answers."""
PER_QUESTION = "a subset per question"
CARD = ("kind", "model_id", "data", "config", "seconds", "held_out", "spans")


MODEL = "tiny-qwen2-vl"
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
        for one in tables.values():
            answers = PackedAnswers.from_json(one.pop("answers"))
            one["rows"] = compared(one["rows"], answers, self.rivals)
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
        tables = {title: one for title, one in stored.items() if title in self.sets}
        for title, one in tables.items():
            wrong = [k for k in ("model", "split") if one[k] != getattr(args, k)]
            if wrong and title not in args.sets:
                differences = ", ".join(
                    f"{k} {one[k]!r} instead of {getattr(args, k)!r}" for k in wrong
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


OPTIONS = {
    "model": MODEL,
    "weights": (None, "trained part; default: in the folder of the model"),
    "items": (300, "questions per set"),
    "batch": 30,
    "split": ("test", "", ("validation", "test")),
    "device": "auto",
}
