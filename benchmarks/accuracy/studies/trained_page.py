"""The page of a trained method: tables, paired tests, provenance, training commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.tables import NONE, SLACK, table
from benchmarks.publishing import MARK, provenance
from tokencomp.evaluation.metrics import Difference, difference, mcnemar
from tokencomp.evaluation.settings import DOWNSCALE

Rivals = Mapping[str, tuple[str, ...]]
COLUMNS = (
    "method", "ratio", "accuracy", "retention", "p against random", "vs downscale",
    "where downscale fails", "same answer as full",
)  # fmt: skip
TITLES = {
    "adsc": "ADSC: what training an adapter for compression gains",
    "selector": "The trained selector against its oracle and the raw attention row",
    "selector_features": "The trained selector that reads no attention, for servers",
    "ccam": "The trained ccam projector, by number of frames",
    "long_video-tiny-qwen2-vl": "Videos longer than in training, with M-RoPE positions",
    "long_video-tiny-llava-onevision": "Videos longer than in training, with 1-D positions",
}
OUTCOMES = ("better", "worse")


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


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a table as text; smaller pictures with too many tokens are no baseline."""
    low, high = row.get("interval") or (None, None)
    kept, p = row.get("retention"), row.get("vs_random", {}).get("p")
    retention = "" if kept is None else f"{kept:.1%} [{low:.1%}, {high:.1%}]"
    shown = [f"{row['accuracy']:.1%}", retention, "" if p is None else f"{p:.2g}"]
    gap, (right, count) = row.get("vs_downscale"), row.get("where_downscale_fails", (0, 0))
    shown += [
        "" if gap is None else str(Difference(**gap, items=0)),
        f"{right / count:.0%} of {count}" if count else "",
        f"{row['agreement']:.0%}" if "agreement" in row else "",
    ]
    if row["name"] == DOWNSCALE and not reaches(row):
        shown = [NONE] * len(shown)
    return [row["name"], f"{row['ratio']:.3g}", *shown]


def tests(tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, dict[str, Any]]]:
    """Set, row, rival and outcome of every paired test."""
    for title, content in tables.items():
        for row in content["rows"]:
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
        outcomes = pairs.setdefault((row["name"], rival), {})
        text = f"{title} at {row['ratio']:.3g} (p = {test['p']:.2g})"
        outcomes.setdefault(outcome(test), []).append(text)
    lines = []
    for (name, rival), outcomes in pairs.items():
        clear = [f"{k}: {', '.join(outcomes[k])}" for k in OUTCOMES if k in outcomes]
        even = len(outcomes.get("no difference", ()))
        rest = [f"no difference in {even} {'other ' if clear else ''}comparisons"] if even else []
        lines.append(f"- {name} against {rival}: {'; '.join([*clear, *rest])}.")
    return lines


def markdown(name: str, tables: dict[str, Any]) -> str:
    """The tables as a page."""
    intro = (
        "Retention is the accuracy divided by the full model's on the same questions, with a "
        "paired bootstrap 95 % interval; p is an exact McNemar test. `downscale` is the full model "
        "on smaller pictures or fewer frames with as many tokens; – marks ratios that the "
        "processor does not reach."
    )
    if any("random" not in content["provenance"] for content in tables.values()):
        intro += (
            " On this page, `random` uses one subset for all questions whose media have the same "
            "grid."
        )
    parts = [
        f"# {TITLES.get(name, name)}",
        f"{intro} [Methods](METHODS.md).",
        "\n".join(verdicts(tables)),
    ]
    for title, content in tables.items():
        source = f"{content['model']}, {content['split']} split of ShapesQA"
        facts = content["provenance"]
        mark = "" if facts.get(MARK, True) else " **Not for publication: uncommitted changes.**"
        parts += [
            f"## {title}",
            f"{source}: {', '.join(content['families'])}. {provenance(facts)}.{mark}",
            table(COLUMNS, [cells(row) for row in content["rows"]]),
        ]
    paired = [paired_row(*test) for test in tests(tables)]
    if paired:
        head = ["set", "method", "ratio", "against", "won", "lost", "p", "outcome"]
        parts += ["## Paired tests", table(head, paired)]
    trained = training(tables)
    parts += ["## Training", "\n".join(trained)] if trained else []
    return "\n\n".join(parts) + "\n"


def training(tables: dict[str, Any]) -> list[str]:
    """The training commands of the measured weights; for a lost card, what is known of them."""
    lines = []
    for content in tables.values():
        for name, card in content["trained"].items():
            if isinstance(card, str):
                text = card
            else:
                time = f"{card['seconds']:.0f} s" if card.get("seconds") else "time not recorded"
                text = f"`{training_command(card)}` ({time})"
            lines.append(f"- {name}: {text}.")
    return list(dict.fromkeys(lines))


def training_command(card: dict[str, Any]) -> str:
    """The command line that wrote a card, with all options, defaults included."""
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
