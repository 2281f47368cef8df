"""What the scripts of the trained methods share: arguments, baselines, and files that remember."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trained_page import Rivals, compared, markdown

from tokencomp.adapters.base import adapter_for
from tokencomp.errors import OptionError
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.environment import environment
from tokencomp.evaluation.settings import DOWNSCALE
from tokencomp.inputs.questions import Example
from tokencomp.trained.cards import replace_file, write_json
from tokencomp.training.measure import FULL, Measurement, Way

HERE = Path(__file__).parent
PER_QUESTION = "a subset per question"
CARD = ("kind", "model_id", "data", "config", "seconds", "held_out", "spans")


def parser(doc: str | None, sets: Iterable[str]) -> argparse.ArgumentParser:
    """Arguments of every script."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="tiny-qwen2-vl")
    made.add_argument("--weights", help="trained part; default: beside the model")
    made.add_argument("--items", type=int, default=300, help="questions per set")
    made.add_argument("--batch", type=int, default=30)
    made.add_argument("--split", default="test", choices=("validation", "test"))
    made.add_argument("--device", default="auto")
    made.add_argument("--output", type=Path, default=HERE)
    made.add_argument("--sets", nargs="+", choices=list(sets), default=list(sets))
    made.add_argument("--report", action="store_true", help="only rebuild the page")
    made.set_defaults(every=list(sets))
    return made


class Shrunk(Sequence[Example]):
    """Questions about media that give the processor fewer tokens."""

    def __init__(
        self, source: Sequence[Example], shrink: EqualTokens, ratio: float, frames: int
    ) -> None:
        self.source, self.shrink, self.ratio, self.frames = source, shrink, ratio, frames
        self.achieved: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        example, count = self.source[index], self.shrink.tokens
        media = example.load(self.frames)
        smaller = tuple(self.shrink.shrink(m, self.ratio) for m in media)
        self.achieved[index] = 1 - sum(map(count, smaller)) / sum(map(count, media))
        return replace(example, media=smaller)


def ask(
    models: dict[str, Any],
    processor: Any,
    source: Sequence[Example],
    ways: Sequence[Way],
    title: str,
    batch: int,
    frames: int = 8,
    smaller: Sequence[str] = (DOWNSCALE,),
) -> tuple[Measurement, list[Way]]:
    """Answers of all ways, of uniform choice, and on smaller media at the same ratios.

    Parameters
    ----------
    models
        Variants by name, see `Measurement`.
    smaller
        Input baselines, see `EqualTokens`.

    Returns
    -------
    Measurement, list of Way
        The answers, and all that was asked, by ratio.
    """
    ratios = sorted({w.ratio for w in ways if w.ratio})
    asked = [*ways, *(Way("uniform", r, "uniform") for r in ratios)]
    measured = Measurement(models, processor, frames, batch)
    measured.run(source, asked, title)
    for name in smaller:
        shrink = EqualTokens(processor, list(adapter_for(models[""]).placeholder_ids()), name)
        for way in (Way(name, r) for r in ratios):
            fewer = Shrunk(source, shrink, way.ratio, frames)
            alone = Measurement({"": models[""]}, processor, frames, batch)
            alone.run(fewer, [], f"{title}, {way.key}")
            for mine, theirs in zip(measured.records, alone.records, strict=True):
                for part in ("told", "correct"):
                    mine[part][way.key] = theirs[part][Way(FULL).key]
            measured.achieved[way.key] = list(fewer.achieved.values())
            asked.append(way)
    return measured, sorted(asked, key=lambda w: w.ratio)


class Book:
    """Tables and answers of one method, by set; sets that are not asked again stay as they are.

    Parameters
    ----------
    name
        Of the files: `name`.json (tables), `name`.jsonl (answers), `name`.md (page).
    args
        From `parser`.
    rivals
        With which other methods a method is compared, answer by answer.

    Attributes
    ----------
    sets
        What is to be asked now.

    Raises
    ------
    OptionError
        The files are of another model or split.
    """

    def __init__(self, name: str, args: argparse.Namespace, rivals: Rivals) -> None:
        self.name, self.args, self.rivals = name, args, rivals
        self.tables: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.sets = [] if args.report else args.sets
        if args.output.joinpath(f"{name}.json").exists():
            self._read()

    def _read(self) -> None:
        at, args = self.args.output / self.name, self.args
        self.tables = json.loads(Path(f"{at}.json").read_text())["tables"]
        lines = Path(f"{at}.jsonl").read_text().splitlines()
        self.records = [json.loads(line) for line in lines]
        if self.sets:  # sets that the script no longer has go
            self.tables = {n: t for n, t in self.tables.items() if n in args.every}
            self.records = [r for r in self.records if r["set"] in args.every]
        for title, found in self.tables.items() if self.sets else ():
            wrong = [k for k in ("model", "split") if found[k] != getattr(args, k)]
            if wrong and title not in self.sets:
                told = ", ".join(f"{k} {found[k]!r} instead of {getattr(args, k)!r}" for k in wrong)
                raise OptionError(
                    f"{at}.json: the table {title!r} is of {told}, and one page has one of each. "
                    "Ask all --sets again, or give another --output."
                )

    def add(
        self,
        title: str,
        rows: list[dict[str, Any]],
        records: list[dict[str, Any]],
        cards: dict[str, Path],
        **more: Any,
    ) -> None:
        """Put in the rows and answers of one set, made now with the weights of `cards`."""
        script = Path(sys.argv[0]).name
        command = shlex.join(["python", f"benchmarks/accuracy/{script}", *sys.argv[1:]])
        told = {k: json.loads(path.read_text()) for k, path in cards.items()}
        self.tables[title] = {
            "model": self.args.model,
            "split": self.args.split,
            "families": list(dict.fromkeys(r["family"] for r in records)),
            "made": {**environment(), "command": command, "random": PER_QUESTION},
            "trained": {n: {k: card.get(k) for k in CARD} for n, card in told.items()},
            "rows": rows,
            **more,
        }
        others = [r for r in self.records if r["set"] != title]
        self.records = [*others, *({"set": title, **r} for r in records)]

    def write(self, notes: str = "") -> None:
        """All three files, `notes` at the end of the page."""
        for title, found in self.tables.items():
            mine = [r for r in self.records if r["set"] == title]
            found["rows"] = compared(found["rows"], mine, self.rivals)
        page = markdown(self.tables) + (f"\n{notes}\n" if notes else "")
        lines = "".join(json.dumps(r) + "\n" for r in self.records)
        at = self.args.output
        write_json(at / f"{self.name}.json", {"tables": self.tables})
        replace_file(at / f"{self.name}.md", lambda part: part.write_text(page))
        replace_file(at / f"{self.name}.jsonl", lambda part: part.write_text(lines))
        print(page)
