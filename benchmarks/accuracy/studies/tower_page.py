"""The page and the data of `benchmarks.accuracy.studies.tower`, from stored answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.studies.tower_book import CEILING, FULL, SMALLER, Sets
from benchmarks.publishing import TABLES
from tokencomp.evaluation.metrics import difference, retention

RATIO, ENTRY = 0.75, "condiv"
TOWER = (0.5, 0.6, 0.75)
PREAMBLE = f"""Share of the right answers that k-center in the vision tower keeps, in brackets the
paired 95 % interval: 100 % is the same decoder ratio ({RATIO}, `{ENTRY}`) with a tower that sees
all patches. `downscale` gives the tower fewer pixels instead, at about the same tower ratio:
smaller media where the tower takes any size, else a tower with interpolated position embeddings
(LLaVA-OneVision, VILA). Test questions of ShapesQA on the embedded models, whose towers have three
to eight blocks. The usual videos have a fixed camera and objects that differ in colour from the
background, which favours scores on pixels; hard videos pan, with noise in every frame, and half of
them have textures in the colours of objects. No percentage here carries over to other models.
[Every method, tower ratio and question family]({TABLES}); `keyframes`, which chose whole frames
by thumbnails, is no longer part of tokencomp. [Methods](METHODS.md)."""
DISTANCES = """Validation questions: share of the right answers of a full tower at the entry ratio
that k-center keeps, by the weights of contrast and change (`std_weight`, `temporal_weight`; 0, 0
compares average colours alone). The default is 1, 1, which has the largest mean at 0.75. The
decoder used condiv of that time (power 1.0). [By question family](../README.md#tables-as-csv)."""


def page(sets: Sets) -> str:
    """The page of all sets."""
    head = ["questions", "n", "full model", "full tower", *(f"k-center, {t:g}" for t in TOWER)]
    rows = [_line(name, entry) for name, entry in sets.items()]
    made = [f"- {n}: {publishing.provenance(entry['provenance'])}" for n, entry in sets.items()]
    parts = [
        "# What does dropping patches before the vision tower cost in accuracy?",
        "`python -m benchmarks.accuracy.studies.tower`",
        publishing.table([*head, f"random, {TOWER[0]:g}", f"downscale, about {TOWER[0]:g}"], rows),
        PREAMBLE,
    ]
    return "\n\n".join([*parts, "## Runs", "\n".join(made)]) + "\n"


def _line(name: str, entry: dict[str, Any]) -> list[str]:
    answers = entry["answers"].correct
    ceiling = answers[CEILING]
    keys = [f"kcenter@{t:g}" for t in TOWER]
    kept = [str(retention(answers[key], ceiling)) if key in answers else "–" for key in keys]
    smaller = [key for key in answers if key.startswith(f"{SMALLER[0]}@")]
    nearest = min(smaller, key=lambda key: abs(float(key.partition("@")[2]) - TOWER[0]), default="")
    for key in (f"random@{TOWER[0]:g}", nearest):
        kept.append(f"{_mean(answers[key]) / _mean(ceiling):.1%}" if key in answers else "–")
    shares = [f"{_mean(answers[key]):.1%}" for key in (FULL, CEILING)]
    return [name, str(len(ceiling)), *shares, *kept]


def records(sets: Sets) -> list[dict[str, Any]]:
    """The rows of the CSV file: every method and tower ratio, also by question family."""
    rows = []
    for name, entry in sets.items():
        answers = entry["answers"].correct
        for key, values in answers.items():
            method, _, tower = key.rpartition("@")
            kept, gap = (f(values, answers[CEILING]) for f in (retention, difference))
            rows.append(
                {
                    "set": name,
                    "model": entry["model"],
                    "method": method,
                    "tower_ratio": float(tower),
                    "accuracy": _mean(values),
                    "kept_of_full": _mean(values) / _mean(answers[FULL]),
                    "kept_of_full_tower": kept.value,
                    "kept_low": kept.low,
                    "kept_high": kept.high,
                    "minus_full_tower": gap.value,
                    "minus_low": gap.low,
                    "minus_high": gap.high,
                    **{f: _mean([values[i] for i in own]) for f, own in _groups(entry).items()},
                }
            )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _groups(entry: dict[str, Any]) -> dict[str, list[int]]:
    """Numbers of the questions of every column; hard videos also by their background."""
    families, vivid = entry["answers"].questions.families, entry["vivid"]
    groups = {f: [i for i, g in enumerate(families) if g == f] for f in dict.fromkeys(families)}
    if vivid:
        for mark, title in ((0, "panning"), (1, "panning, texture in colours of objects")):
            groups[title] = [i for i, v in enumerate(vivid) if v == mark]
    return {title: rows for title, rows in groups.items() if rows}


def distances(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """What k-center keeps with other distances, on validation questions: section and CSV rows."""
    sets: dict[str, Any] = publishing.read(path)["sets"] if path.exists() else {}
    books = {name: PackedAnswers.from_json(entry["answers"]) for name, entry in sets.items()}
    if not books:
        return "", []
    lines, rows = [], []
    for key in next(iter(books.values())).correct:
        weights, _, tower = key.partition("@")
        shares = [_mean(b.correct[key]) / _mean(b.correct[CEILING]) for b in books.values()]
        if key != CEILING:
            lines.append([weights, tower, *(f"{share:.1%}" for share in shares)])
        for name, book in books.items():
            groups = _groups({"answers": book, "vivid": []})
            families = {f: _mean([book.correct[key][i] for i in own]) for f, own in groups.items()}
            accuracy = {"accuracy": _mean(book.correct[key])}
            rows.append({"set": name, "weights": weights, "tower_ratio": float(tower)}
                        | accuracy | families)  # fmt: skip
    head = [
        "contrast, change",
        "tower ratio",
        *(f"{n} ({len(b.questions)})" for n, b in books.items()),
    ]
    table = publishing.table(head, lines)
    return f"## What k-center compares\n\n{table}\n\n{DISTANCES}\n", rows
