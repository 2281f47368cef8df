"""What `tokencomp doctor --conformance` prints and writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer


def conformance_run(types: list[str], as_json: bool, output: Path | None, page: Path | None) -> int:
    """Run conformance, show and write the results; return the exit code.

    It is 1 if a type does worse than in the results that the package carries.
    """
    from tqdm import tqdm

    from tokencomp.conformance import table
    from tokencomp.conformance.run import check_types, model_classes

    with tqdm(total=len(types) or len(model_classes()), unit="type", file=sys.stderr) as bar:

        def done(name: str, row: dict[str, Any]) -> None:
            bar.set_postfix_str(f"{name}: {row['status']}")
            bar.update()

        results = table.new_table(check_types(types or None, done))
    if output is not None:
        table.save(results, output)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(table.markdown(results), encoding="utf-8")
    worse = table.worse(results)
    if as_json:
        typer.echo(json.dumps({**results, "worse": worse}, indent=2))
    else:
        _show(results, worse)
    return 1 if worse else 0


def _show(results: dict[str, Any], worse: dict[str, str]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from tokencomp.cli import _tables
    from tokencomp.conformance.table import counts, first_sentence

    console = Console()
    title = f"Model types of transformers {results['transformers']}"
    names = ("model type", "status", "error", "effect", "reason")
    rows = _tables.table(*names, gap=1, title=title, overflow="fold")
    colors = {"exact": "green", "entry only": "green", "refused": "yellow", "unverified": "red"}
    for name, row in results["types"].items():
        errors = {k: v for k, v in row["errors"].items() if k not in ("effect", "identity")}
        rows.add_row(
            name,
            f"[{colors[row['status']]}]{row['status']}[/]",
            f"{max(errors.values()):.0e}" if errors else "–",
            f"{row['errors']['effect']:.2g}" if "effect" in row["errors"] else "–",
            escape(first_sentence(row["reason"], 100)),
        )
    console.print(rows)
    console.print("\n" + ", ".join(f"{n} {status}" for status, n in counts(results).items()))
    for name, change in worse.items():
        console.print(f"[red]{name}: {escape(change)}[/]")
