"""The page and the data of a trained method: retention, provenance, training commands."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.tables import NONE, SLACK, table
from benchmarks.publishing import MARK, TABLES, provenance
from tokencomp.evaluation.metrics import difference, mcnemar
from tokencomp.evaluation.settings import DOWNSCALE, FULL

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
            low, high = row.get("interval") or (None, None)
            right, count = row.get("where_downscale_fails", (0, 0))
            gap = row.get("vs_downscale", {})
            shown = {
                "accuracy": row["accuracy"],
                "retention": row.get("retention"),
                "retention_low": low,
                "retention_high": high,
                "vs_downscale": gap.get("value"),
                "vs_downscale_low": gap.get("low"),
                "vs_downscale_high": gap.get("high"),
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
