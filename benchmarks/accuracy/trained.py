"""What the scripts of the trained methods share: arguments, and files with their manifest."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tokencomp.evaluation.environment import commit, hardware, versions
from tokencomp.weights import replace_file, write_json

HERE = Path(__file__).parent
COLUMNS = ("method", "ratio", "accuracy", "retention", "p against random")


def parser(doc: str | None) -> argparse.ArgumentParser:
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
    return made


def publish(
    name: str,
    args: argparse.Namespace,
    tables: dict[str, Any],
    records: list[dict[str, Any]],
    card: Path,
    notes: str = "",
) -> None:
    """Write `name`.json, `name`.jsonl and `name`.md (`notes` at its end), and print the tables."""
    from rich.console import Console
    from rich.table import Table

    trained = json.loads(card.read_text())
    command = shlex.join(["python", f"benchmarks/accuracy/{name}.py", *sys.argv[1:]])
    for found in tables.values():
        found.setdefault("command", command)
    result = {
        "model": args.model,
        "split": args.split,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "trained": {k: trained.get(k) for k in ("config", "data", "seconds", "held_out", "spans")},
        "tables": tables,
    }
    write_json(args.output / f"{name}.json", result)
    page = markdown(result) + (f"\n{notes}\n" if notes else "")
    replace_file(args.output / f"{name}.md", lambda part: part.write_text(page))
    lines = "".join(json.dumps(r) + "\n" for r in records)
    replace_file(args.output / f"{name}.jsonl", lambda part: part.write_text(lines))
    console = Console()
    for title, found in tables.items():
        table = Table(*COLUMNS, title=title)
        for row in found["rows"]:
            table.add_row(*cells(row))
        console.print(table)


def stored(
    name: str, args: argparse.Namespace, sets: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tables and records of `sets` as an earlier run wrote them; sets it lacks are left out."""
    if not sets or not (args.output / f"{name}.json").exists():
        return {}, []
    earlier = json.loads((args.output / f"{name}.json").read_text())
    tables = {n: {"command": earlier.get("command"), **t} for n, t in earlier["tables"].items()}
    lines = (args.output / f"{name}.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["set"] in sets]
    return {n: t for n, t in tables.items() if n in sets}, records


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a table as text."""
    low, high = row.get("interval") or (None, None)
    kept = row.get("retention")
    told = "" if kept is None else f"{kept:.1%} [{low:.1%}, {high:.1%}]"
    p = row.get("vs_random", {}).get("p")
    p_text = "" if p is None else f"{p:.2g}"
    return [row["name"], f"{row['ratio']:.3g}", f"{row['accuracy']:.1%}", told, p_text]


def markdown(result: dict[str, Any]) -> str:
    """The tables as a page."""
    versions = result["versions"]
    parts = [
        f"{result['model']}, {result['split']} split of ShapesQA, {result['hardware']['cpu']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{result['date'][:10]}. Retention: accuracy over the full model's on the same "
        "questions, paired bootstrap 95 % interval; p: exact McNemar test."
    ]
    for title, found in result["tables"].items():
        lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in found["rows"]]
        parts += [f"## {title}", f"Made by `{found['command']}`.", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"
