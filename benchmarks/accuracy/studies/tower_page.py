"""The page of `benchmarks.accuracy.studies.tower`, from stored answers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.compact import read_sweep
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.store import RESULTS, learned_families
from benchmarks.accuracy.studies.tower_book import CEILING, FULL, SMALLER, Sets
from benchmarks.stored import NOTE, read_stored
from tokencomp.evaluation.metrics import difference, retention

RATIO, ENTRY = 0.75, "condiv"
TOWER = (0.5, 0.6, 0.75)
SEEN = ("what the tower sees", "tower ratio")
BARS = {0.5: 0.97, 0.75: 0.92}
"""Share of the accuracy of entry only that k-center should keep at these tower ratios."""
PREAMBLE = f"""# Patches dropped before the vision tower

Accuracy on ShapesQA with the embedded models, at decoder ratio {RATIO} with `{ENTRY}` at entry in
all rows but "full" and "random at entry". Intervals are paired bootstraps over questions. Usual
videos of ShapesQA have a fixed camera and objects that differ in colour from their background, and
the towers have three to eight blocks: this favours scores on pixels, and no percentage here carries
over to other models. Hard videos have a background that pans behind the objects and noise in every
frame; half of them have textures in the colours of objects.
"downscale" gives the tower fewer pixels: smaller media where the tower takes any size, and a tower
with interpolated position embeddings where all pictures have one size (LLaVA-OneVision, VILA).
A question family counts as learned if the full model is at least 25 points above a blind guess on
the validation split, as on the page of [all methods](summary.md). [All benchmark
pages](../README.md).

`keyframes` chose whole frames by thumbnails. It is no longer part of tokencomp: on five of the
seven sets of videos it kept less than k-center at every tower ratio, as its rows show.
"""

Answers = dict[str, list[int]]


def page(sets: Sets) -> str:
    """The page of all sets."""
    lines = [PREAMBLE, NOTE, ""]
    for name, entry in sets.items():
        answers = entry["answers"].correct
        families = dict.fromkeys(entry["answers"].questions.families)
        full = answers[FULL]
        lines += [
            f"## {name}", "",
            f"{entry['model']}, {entry['split']} split, {len(full)} questions "
            f"({', '.join(families)}). The full model answers {_mean(full):.1%} rightly.", "",
            _table(answers), "", *verdicts(answers), "",
            *_families(entry, answers),
        ]  # fmt: skip
        lines += [NOTES[name], ""] if name in NOTES else []
        lines += [f"Made by: {publishing.provenance(entry['provenance'])}", ""]
    return "\n".join(lines)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _table(answers: Answers) -> str:
    """All questions of a set together."""
    ceiling, accuracy = answers[CEILING], _mean(answers[FULL])
    kept = ("kept of full", "kept of entry only (95 %)", "minus entry only, points (95 %)")
    rows = []
    for key, values in answers.items():
        row, _, tower = key.rpartition("@")
        shares = [f"{share:.1%}" for share in (_mean(values), _mean(values) / accuracy)]
        gaps = [str(compare(values, ceiling)) for compare in (retention, difference)]
        rows.append([row, tower, *shares, *gaps])
    return publishing.table([*SEEN, "accuracy", *kept], rows)


def verdicts(answers: Answers) -> list[str]:
    """Whether k-center meets its bars, and beats fewer pixels or frames at no more tower work."""
    ceiling, sentences = sum(answers[CEILING]), []
    for tower, bar in BARS.items():
        kept = sum(answers[f"kcenter@{tower:g}"]) / ceiling
        verb = "meets" if kept >= bar else "misses"
        sentences.append(
            f"- k-center at {tower:g} keeps {kept:.1%} of entry only: it {verb} {bar:.0%}."
        )
    for key, rival, gap in _duels(answers):
        verb = "above" if gap.low > 0 else "below" if gap.high < 0 else "not different from"
        sentences.append(f"- k-center at {key} is {verb} {rival}: {_points(gap)}.")
    return sentences


def _duels(answers: Answers) -> Iterator[tuple[str, str, Any]]:
    """k-center against smaller media, at a tower ratio that is no less than theirs."""
    for key, values in answers.items():
        row, _, tower = key.rpartition("@")
        if row in SMALLER:
            ours = next((t for t in TOWER if t >= float(tower) - 0.005), TOWER[-1])
            gap = difference(answers[f"kcenter@{ours:g}"], values)
            yield f"{ours:g}", f"{row} at {tower}", gap


def _points(gap: Any) -> str:
    return f"{100 * gap.value:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def _families(entry: dict[str, Any], answers: Answers) -> list[str]:
    """One column per question family: accuracy, and points against entry only."""
    groups = _groups(entry)
    if not groups:
        return []
    title = "Accuracy by question family; behind it, points minus entry only (95 %):"
    ceiling, table = answers[CEILING], []
    for key, values in answers.items():
        row, _, tower = key.rpartition("@")
        cells = []
        for rows in groups.values():
            own, top = [values[i] for i in rows], [ceiling[i] for i in rows]
            gap = "" if key == CEILING else f", {difference(own, top)}"
            cells.append(f"{_mean(own):.1%}{gap}")
        table.append([row, tower, *cells])
    rows_of_page = publishing.table([*SEEN, *groups], table)
    return [title, "", rows_of_page, "", *_losses(entry, answers), ""]


def _groups(entry: dict[str, Any]) -> dict[str, list[int]]:
    """Numbers of the questions of every column; hard videos also by their background."""
    families, vivid = entry["answers"].questions.families, entry["vivid"]
    groups = {f: [i for i, g in enumerate(families) if g == f] for f in dict.fromkeys(families)}
    if vivid:
        for mark, title in ((0, "panning"), (1, "panning, texture in colours of objects")):
            groups[title] = [i for i, v in enumerate(vivid) if v == mark]
    return {title: rows for title, rows in groups.items() if rows}


def _learned(model: str) -> tuple[str, ...]:
    """Families that a model has learned, by its published answers to validation questions."""
    return learned_families(read_sweep(RESULTS / model / "validation.json"))


def _losses(entry: dict[str, Any], answers: Answers) -> list[str]:
    """In which learned families k-center is not above smaller media, and which are not learned."""
    unlearned, beaten, open_, clear = [], [], [], 0
    learned, blind = _learned(entry["model"]), entry["blind"]
    for title, rows in _groups(entry).items():
        part = {key: [values[i] for i in rows] for key, values in answers.items()}
        duels = list(_duels(part))
        if title in blind and title not in learned:
            gaps = ", ".join(f"{ours} against {rival} {_points(gap)}" for ours, rival, gap in duels)
            full = f"{_mean(part[FULL]):.0%}, a blind guess {blind[title]:.0%}"
            unlearned.append(
                f"- Not learned, and therefore not among these: {title} ({full}): {gaps}."
            )
            continue
        for ours, rival, gap in duels:
            line = f"{title}: {ours} against {rival}, {_points(gap)}"
            clear += gap.low > 0
            if gap.low <= 0:
                (beaten if gap.value < 0 else open_).append(line)
    lines = [f"- By family, k-center is above smaller media outside of the interval {clear} times."]
    lines += [f"- No difference outside of the interval: {'; '.join(open_)}."] if open_ else []
    lines += [f"- The point estimate is below them: {'; '.join(beaten)}."] if beaten else []
    return lines + unlearned


def distances(path: Path) -> list[str]:
    """What k-center keeps with other distances, on validation questions; empty without results."""
    if not path.exists():
        return []
    sets: dict[str, Any] = read_stored(path)["sets"]
    books = {name: PackedAnswers.from_json(entry["answers"]) for name, entry in sets.items()}
    rows = [key for key in next(iter(books.values())).correct if key != CEILING]
    lines = [
        "## What k-center compares", "",
        "Validation questions, decoder ratio 0.75: share of the accuracy of entry only that "
        "k-center keeps with other weights of contrast and change (`std_weight=`, "
        "`temporal_weight=`; 0 and 0 compare averages of pixels alone). Questions of a set in "
        "brackets. The default, 1 and 1, has the largest mean over the sets at 0.75. In the "
        "decoder, condiv had its power of that time, 1.0, on images too, and kept fewer words. "
        "Averages alone are ahead of it at 0.75 on the videos of LLaVA-OneVision and on hard "
        "videos, by one or two questions of a set.", "",
    ]  # fmt: skip
    table = []
    for key in rows:
        weights, _, tower = key.partition("@")
        shares = [sum(b.correct[key]) / sum(b.correct[CEILING]) for b in books.values()]
        table.append([weights, tower, *(f"{share:.1%}" for share in shares)])
    head = [f"{name} ({len(book.questions)})" for name, book in books.items()]
    text = publishing.table(["contrast, change", "tower ratio", *head], table)
    return [*lines, text, "", *_moved(books, rows)]


def _moved(books: dict[str, PackedAnswers], rows: Sequence[str]) -> list[str]:
    """The question families for which contrast and change were added."""
    lines = ["Accuracy of the two question families that the additions are for:", ""]
    for name, family in (("qwen3-images", "reading"), ("qwen3-videos", "action_count")):
        if name not in books:
            continue
        book = books[name]
        own = [i for i, other in enumerate(book.questions.families) if other == family]
        parts = [
            f"{key.replace('@', ' at ')}: {_mean([book.correct[key][i] for i in own]):.1%}"
            for key in rows
        ]
        top = _mean([book.correct[CEILING][i] for i in own])
        lines.append(f"- {family} ({len(own)}): entry only {top:.1%}; {'; '.join(parts)}.")
    return [*lines, ""]


NOTES: dict[str, str] = {
    "qwen-images": "Small objects cost k-center most. A likely reason: its thumbnails average over "
    "4 × 4 pixels inside of every patch, so an object of a few pixels changes the look of its cell "
    "little, and cells with the edges of large objects go first. Fewer pixels lose more there. "
    "Counting is the family in which fewer pixels do as well: what it loses, it loses at the entry "
    "of the decoder (see the variants of k-center below).",
    "qwen-videos": "What k-center loses is in `needle`, objects that are seen in few frames, for "
    "the same likely reason as small objects in images. Fewer pixels and frames lose more.",
    "onevision-images": "In counting, which this model has hardly learned, fewer pixels do as well "
    "as k-center, or better. A likely reason: the objects to be counted are large, and a tower "
    "that sees all of the picture at a lower resolution misses none of them. Against entry only, "
    "k-center loses nothing.",
    "onevision-hard-videos": "A background that moves makes all places change, and cells with its "
    "texture compete with those of objects. At 0.75 k-center therefore loses more than on usual "
    "videos, where the background is the same in all frames, and misses the bar by one question. "
    "That is the likely reason; fewer pixels and fewer frames lose more.",
    "qwen3-images": "What k-center loses at 0.75 is in words, places and small objects. A likely "
    "reason: an object of few pixels changes the look of its cell little, and cells with the edges "
    "of large objects go first. A word needs most of its letters, and k-center does not know that "
    "cells belong together.",
    "qwen3-videos": "Repeated flashes stay because changes count. An object that appears again in "
    "the same place looks the same, and with averages alone k-center lets go what looks the same "
    "as something that it keeps (see what k-center compares). keyframes did that with whole "
    "frames.",
    "vila-videos": "k-center misses both bars by one question each. It loses objects that are seen "
    "in few frames. A likely reason: this tower takes frames one by one, so k-center has to keep "
    "an equal share of every frame, also of those that show nothing new. keyframes dropped such "
    "frames whole and kept more of the others: 98.2% of entry only at 0.5 and at 0.75.",
}
"""What explains the losses of a set, by name."""
