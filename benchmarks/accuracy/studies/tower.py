"""Patches dropped before the vision tower: accuracy, against fewer pixels at the same tower work.

    python -m benchmarks.accuracy.studies.tower                       # all sets
    python -m benchmarks.accuracy.studies.tower --sets qwen-images --items 60
    python -m benchmarks.accuracy.studies.tower --report              # only rebuilds the page

writes tower.json (answers per question, provenance) and tower.md. All rows leave the decoder the
same share of the tokens of the full input: what differs is what the vision tower saw. "entry only"
is the ceiling, in which it sees everything. Media with fewer pixels or frames give the processor as
few tokens as the tower stage leaves, and the decoder then reduces them by the rest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.library import (
    DOWNSCALE,
    FEWER_FRAMES,
    EqualTokens,
    Example,
    Setting,
    adapter_for,
    difference,
    environment,
    items,
    load_model,
    one_message,
    retention,
    shapesqa,
    sweep,
    write_json,
)
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.trained import Shrunk

RATIO, ENTRY = 0.75, "condiv"
TOWER = (0.5, 0.6, 0.75)
IMAGES = ("attribute", "existence", "count", "small_object")
VIDEOS = ("needle", "video_existence")
QWEN, ONEVISION, VILA = "tiny-qwen2-vl", "tiny-llava-onevision", "tiny-vila"
SETS = {
    "qwen-images": (QWEN, IMAGES, ("kcentre", "random", "uniform"), (DOWNSCALE,)),
    "qwen-videos": (
        QWEN, VIDEOS, ("kcentre", "runlength", "random", "uniform"), (DOWNSCALE, FEWER_FRAMES),
    ),
    "onevision-images": (ONEVISION, IMAGES, ("kcentre", "random", "uniform"), ()),
    "onevision-videos": (ONEVISION, VIDEOS, ("kcentre", "random", "uniform"), (FEWER_FRAMES,)),
    "vila-images": (VILA, IMAGES, ("kcentre", "random", "uniform"), ()),
}  # fmt: skip
BARS = {0.5: 0.97, 0.75: 0.92}
"""Share of the accuracy of entry only that k-centre should keep at these tower ratios."""


def settings(reducers: Sequence[str]) -> dict[str, Setting]:
    """Rows on whole media, by name and tower ratio."""
    rows = {"full@0": Setting(), "entry only@0": Setting(ENTRY, RATIO)}
    rows["random at entry@0"] = Setting("random", RATIO)
    for reducer in reducers:
        for tower in TOWER:
            options = {"tower_ratio": tower, "tower_reducer": reducer}
            rows[f"{reducer}@{tower:g}"] = Setting(ENTRY, RATIO, options, name=f"{reducer} {tower}")
    return rows


def right(runs: dict[Setting, Any], setting: Setting, ids: Sequence[str]) -> list[int]:
    """1 for every question that was answered rightly, in the order of `ids`."""
    answers = {r["id"]: int(bool(r["correct"])) for r in runs[setting].answered}
    return [answers[name] for name in ids]


def run_set(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Answers of all rows of a set."""
    model_name, families, reducers, smaller = SETS[name]
    model, processor = load_model(model_name, device="cpu")
    questions = items(args.split, args.items // len(families), families)
    source = shapesqa(questions, ACCURACY / "results" / "media" / args.split)
    ids = [example.id for example in source]
    rows = settings(reducers)
    options: dict[str, Any] = {"batch_size": args.batch, "name": model_name}
    runs = sweep(model, processor, source, list(rows.values()), progress=name, **options)
    answers = {key: right(runs, setting, ids) for key, setting in rows.items()}
    placeholders = list(adapter_for(model).placeholder_ids())
    for kind in smaller:
        shrink = EqualTokens(processor, placeholders, kind)
        for tower in TOWER:
            fewer: Any = Shrunk(source, shrink, tower, 8)
            examples: list[Example] = [fewer[i] for i in range(len(source))]
            achieved = sum(fewer.achieved.values()) / len(fewer.achieved)
            ratio = max(0.0, 1 - (1 - RATIO) / (1 - achieved))
            setting = Setting(ENTRY, ratio) if ratio > 0.01 else Setting()
            done = sweep(
                model, processor, examples, [setting], progress=f"{name} {kind}", **options
            )
            answers[f"{kind}@{achieved:.3g}"] = right(done, setting, ids)
    return {
        "model": model_name, "split": args.split, "families": list(families), "ids": ids,
        "answers": {key: "".join(map(str, values)) for key, values in answers.items()},
    }  # fmt: skip


def page(book: dict[str, Any]) -> str:
    lines = [PREAMBLE]
    for name, entry in book["sets"].items():
        answers = {k: list(map(int, v)) for k, v in entry["answers"].items()}
        full, ceiling = answers["full@0"], answers["entry only@0"]
        accuracy = sum(full) / len(full)
        lines += [
            f"## {name}", "",
            f"{entry['model']}, {entry['split']} split, {len(full)} questions "
            f"({', '.join(entry['families'])}). The full model answers {accuracy:.1%} rightly.", "",
            "| what the tower sees | tower ratio | accuracy | kept of full | kept of entry only "
            "(95 %) | minus entry only, points (95 %) |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for key, values in answers.items():
            row, _, tower = key.rpartition("@")
            share = sum(values) / len(values)
            lines.append(
                f"| {row} | {tower} | {share:.1%} | {share / accuracy:.1%} | "
                f"{retention(values, ceiling)} | {difference(values, ceiling)} |"
            )
        lines += ["", *verdicts(answers), ""]
    return "\n".join(lines)


def verdicts(answers: dict[str, list[int]]) -> list[str]:
    """Whether k-centre meets its bars, and beats fewer pixels or frames at no more tower work."""
    ceiling, sentences = sum(answers["entry only@0"]), []
    for tower, bar in BARS.items():
        kept = sum(answers[f"kcentre@{tower:g}"]) / ceiling
        verb = "meets" if kept >= bar else "misses"
        sentences.append(
            f"- k-centre at {tower:g} keeps {kept:.1%} of entry only: it {verb} {bar:.0%}."
        )
    for key, values in answers.items():
        row, _, tower = key.rpartition("@")
        if row not in (DOWNSCALE, FEWER_FRAMES):
            continue
        ours = next((t for t in TOWER if t >= float(tower) - 0.005), TOWER[-1])
        gap = difference(answers[f"kcentre@{ours:g}"], values)
        verb = "above" if gap.low > 0 else "below" if gap.high < 0 else "not different from"
        low, high = 100 * gap.low, 100 * gap.high
        sentences.append(
            f"- k-centre at {ours:g} is {verb} {row} at {tower}: {100 * gap.value:+.1f} points "
            f"[{low:+.1f}, {high:+.1f}]."
        )
    return sentences


PREAMBLE = f"""# Patches dropped before the vision tower

Accuracy on ShapesQA with the embedded models, at decoder ratio {RATIO} with `{ENTRY}` at entry in
all rows but "full" and "random at entry". Intervals are paired bootstraps over questions. Videos of
ShapesQA have a fixed camera and objects that differ in colour from their background, and the towers
have three or four blocks: this favours scores on pixels, and no percentage here carries over to
other models. [All benchmark pages](../README.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--items", type=int, default=120, help="questions per set")
    parser.add_argument("--batch", type=int, default=30)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--output", type=Path, default=ACCURACY)
    parser.add_argument("--report", action="store_true", help="only rebuild the page")
    publishing.add_argument(parser)
    args = parser.parse_args()
    path = args.output / "tower.json"
    book = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sets": {}}
    for name in () if args.report else args.sets:
        facts = publishing.published_from(args.output, args.allow_dirty)
        entry = run_set(name, args)
        entry |= {"provenance": {**facts, **environment()}}
        book["sets"] = {n: v for n, v in {**book["sets"], name: entry}.items()}
        write_json(path, book)  # after every set: a run that stops keeps what it has
    book["sets"] = {name: book["sets"][name] for name in SETS if name in book["sets"]}
    (args.output / "tower.md").write_text(page(book), encoding="utf-8")


if __name__ == "__main__":
    with one_message():
        main()
