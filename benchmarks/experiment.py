"""An experiment: what is measured, where its results are, and the page that follows from them.

A module defines one and ends with `EXPERIMENT.main(__doc__)`; `benchmarks.pages` lists them all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.publishing import FOLDER
from tokencomp.cli import one_message
from tokencomp.storage import write_lines, write_text

Files = dict[Path, str]
"""Text by path: a page and its data."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """One file of results and its page.

    Attributes
    ----------
    name
        Of the results below `benchmarks/`: NAME.json, or NAME.jsonl with `lines`.
    measure
        From the command line to results. Each replaces the one before on disk, and the page, so
        that a run which stops leaves what it has. The runner adds `environment`, the provenance.
    page
        Markdown of stored results. The builder adds the last lines: how, when and with what these
        were measured.
    rows
        Rows of the CSV file, or of several by their names; None: there is none.
    options
        Of the command line: by name the default, or the default, a line of help and the choices. A
        list takes several values, False is a switch, and a name in capitals is a path without flag.
    lines
        The results are a list of records, a line each; records of other runs among them have their
        own provenance.
    readme
        The page is the README.md of the folder, not NAME.md.
    """

    name: str
    measure: Callable[[argparse.Namespace], Iterable[Any]]
    page: Callable[[Any], str]
    rows: Callable[[Any], Rows | dict[str, Rows]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lines: bool = False
    readme: bool = False

    @property
    def file(self) -> Path:
        """Where published results are."""
        return FOLDER / f"{self.name}.{'jsonl' if self.lines else 'json'}"

    @property
    def module(self) -> str:
        """What `python -m` runs, also while it runs."""
        return str(self.measure.__globals__["__spec__"].name).removesuffix(".__main__")

    def files(self, results: Path | None = None) -> Files:
        """The page and the data of stored results."""
        path = results or self.file
        stored = publishing.read_lines(path) if self.lines else publishing.read(path)
        page = path.with_name("README.md") if self.readme else path.with_suffix(".md")
        runs = [r["environment"] for r in (stored if self.lines else [stored])]
        end = f"Command: `python -m {self.module}`. {measured(runs)}"
        found = {page: f"{self.page(stored).rstrip()}\n\n{end}\n"}
        data = self.rows(stored) if self.rows is not None else {}
        tables = data if isinstance(data, dict) else {path.stem: data}
        for stem, rows in tables.items():
            if rows:
                found[path.with_name(f"{stem}.csv")] = publishing.csv_text(rows)
        return found

    def parser(self, doc: str | None) -> argparse.ArgumentParser:
        """The command line."""
        parser = publishing.parser(doc, self.file)
        for name, given in self.options.items():
            add_option(parser, name, *(given if isinstance(given, tuple) else (given,)))
        return parser

    def main(self, doc: str | None) -> None:
        """Measure, store, write the page; with `--report` the page alone."""
        with one_message():
            args = self.parser(doc).parse_args()
            if not args.report:
                facts = publishing.published_from(args.out, args.allow_dirty)
                for content in self.measure(args):
                    self.store(args.out, content, facts)
                    write(self.files(args.out))
            elif args.out.exists():
                for path in write(self.files(args.out)):
                    print(path)

    def store(self, path: Path, content: Any, facts: Mapping[str, Any]) -> None:
        """Write results with the provenance of this run."""
        made = {**publishing.environment(), **facts}
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.lines:
            write_lines(path, [{"environment": made, **record} for record in content])
        else:
            publishing.write(path, {"environment": made, **content})


def add_option(
    parser: argparse.ArgumentParser,
    name: str,
    default: Any,
    text: str = "",
    choices: Iterable[Any] | None = None,
) -> None:
    """An option whose type is that of its default, of a list that of its entries, else a path."""
    flag = f"--{name.replace('_', '-')}"
    if name.isupper():
        parser.add_argument(name.lower(), type=Path, nargs="?", metavar=name, help=text)
        return
    if default is False:
        parser.add_argument(flag, action="store_true", help=text)
        return
    first = (*default, Path())[0] if isinstance(default, list) else default
    kind = str if first is None else type(first)
    kind = Path if issubclass(kind, Path) else kind
    how: dict[str, Any] = {"nargs": "+"} if isinstance(default, list) else {}
    text = f"{text} (default: {json.dumps(default, default=str)})".strip().replace("%", "%%")
    parser.add_argument(flag, type=kind, default=default, help=text, choices=choices, **how)


def measured(runs: Iterable[Mapping[str, Any]]) -> str:
    """The last lines of a page: command, machine, versions, commit and date of every run."""
    lines = list(dict.fromkeys(publishing.provenance(run) for run in runs))
    if len(lines) == 1:
        return f"Measured: {lines[0]}."
    return "\n".join(["Measured:", "", *(f"- {line}" for line in lines)])


def write(files: Files, csv: bool = False) -> list[Path]:
    """Write pages and what is chosen; with `csv` the tables of these pages alone."""
    return [write_text(p, text) for p, text in files.items() if (p.suffix == ".csv") is csv]
