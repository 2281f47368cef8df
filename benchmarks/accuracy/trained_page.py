"""The page of a trained method: tables, paired tests, how it was trained and measured."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tables import NONE, SLACK, table

from tokencomp.evaluation.environment import provenance
from tokencomp.evaluation.metrics import mcnemar
from tokencomp.evaluation.settings import DOWNSCALE

Rivals = Mapping[str, tuple[str, ...]]
COLUMNS = ("method", "ratio", "accuracy", "retention", "p against random")


def compared(
    rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], rivals: Rivals
) -> list[dict[str, Any]]:
    """The rows, each with its exact McNemar tests against its rivals at the same ratio."""
    found = []
    for row in rows:
        mine, tests = key(row["name"], row["ratio"]), {}
        for rival in rivals.get(row["name"], ()):
            other = key(rival, row["ratio"])
            if other in records[0]["correct"]:
                test = mcnemar(*([r["correct"][k] for r in records] for k in (mine, other)))
                tests[rival] = {"wins": test.wins, "losses": test.losses, "p": test.p}
        found.append({**row, "against": tests} if tests else row)
    return found


def key(name: str, ratio: float) -> str:
    """As `Way.key` names answers."""
    return f"{name}@{ratio:g}"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a table as text; smaller pictures of too many tokens are no baseline."""
    low, high = row.get("interval") or (None, None)
    kept, p = row.get("retention"), row.get("vs_random", {}).get("p")
    told = "" if kept is None else f"{kept:.1%} [{low:.1%}, {high:.1%}]"
    shown = [f"{row['accuracy']:.1%}", told, "" if p is None else f"{p:.2g}"]
    if row["name"] == DOWNSCALE and row["achieved_ratio"] < row["ratio"] - SLACK:
        shown = [NONE, NONE, NONE]
    return [row["name"], f"{row['ratio']:.3g}", *shown]


def tests(tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, dict[str, Any]]]:
    """Set, row, rival and outcome of every paired test."""
    for title, found in tables.items():
        for row in found["rows"]:
            for rival, test in row.get("against", {}).items():
                yield title, row, rival, test


def paired_row(title: str, row: dict[str, Any], rival: str, test: dict[str, Any]) -> list[str]:
    counts = [str(test["wins"]), str(test["losses"]), f"{test['p']:.2g}"]
    return [title, row["name"], f"{row['ratio']:.3g}", rival, *counts, outcome(test)]


def outcome(test: dict[str, Any]) -> str:
    if test["p"] >= 0.05:
        return "no difference"
    return "better" if test["wins"] > test["losses"] else "worse"


def verdicts(tables: dict[str, Any]) -> list[str]:
    """Per pair of methods, where one is better than the other (p < 0.05)."""
    pairs: dict[tuple[str, str], dict[str, list[str]]] = {}
    for title, row, rival, test in tests(tables):
        found = pairs.setdefault((row["name"], rival), {"better": [], "worse": []})
        told = f"{title} at {row['ratio']:.3g} (p = {test['p']:.2g})"
        found.setdefault(outcome(test), []).append(told)
    lines = []
    for (name, rival), found in pairs.items():
        clear = [f"{k}: {', '.join(found[k])}" for k in ("better", "worse") if found[k]]
        even = len(found.get("no difference", ()))
        rest = [f"no difference in {even} {'other ' if clear else ''}comparisons"] if even else []
        lines.append(f"- {name} against {rival}: {'; '.join([*clear, *rest])}.")
    return lines


def markdown(tables: dict[str, Any]) -> str:
    """The tables as a page."""
    parts = [
        "Retention: accuracy over the full model's on the same questions, paired bootstrap 95 % "
        "interval; p: exact McNemar test. `downscale`: the full model on smaller pictures or fewer "
        "frames of as many tokens; – where the processor does not give so few.",
        "\n".join(verdicts(tables)),
    ]
    if any("random" not in found["made"] for found in tables.values()):
        parts[0] += " `random` is one subset for all questions of a grid on this page."
    for title, found in tables.items():
        told = f"{found['model']}, {found['split']} split of ShapesQA"
        parts += [
            f"## {title}",
            f"{told}: {', '.join(found['families'])}. {provenance(found['made'])}.",
            table(COLUMNS, [cells(row) for row in found["rows"]]),
        ]
    paired = [paired_row(*test) for test in tests(tables)]
    if paired:
        head = ["set", "method", "ratio", "against", "won", "lost", "p", "outcome"]
        parts += ["## Paired tests", table(head, paired)]
    trained = training(tables)
    parts += ["## Training", "\n".join(trained)] if trained else []
    return "\n\n".join(parts) + "\n"


def training(tables: dict[str, Any]) -> list[str]:
    """The commands that trained what was measured; of a lost card, what is known."""
    lines = []
    for found in tables.values():
        for name, card in found["trained"].items():
            if isinstance(card, str):
                told = card
            else:
                time = f"{card['seconds']:.0f} s" if card.get("seconds") else "time not noted"
                told = f"`{training_command(card)}` ({time})"
            lines.append(f"- {name}: {told}.")
    return list(dict.fromkeys(lines))


def training_command(card: dict[str, Any]) -> str:
    """The command line that a card was written by: all options, defaults included."""
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
            told = ",".join(value) if isinstance(value, list | tuple) else str(value)
            parts += [option.opts[0], told]
    return shlex.join([*parts, "--output", "FOLDER"])
