"""Ask a part of the questions behind the README's accuracy again, and compare the answers.

    python -m benchmarks.confirm    # → accuracy/results/tiny-qwen3-vl/confirmed.json

The first 28 questions of each of the eleven families, 308, are put to the full model and to every
method and ratio of the README's rows, through files, processor and `generate`. Answers differ if
one is right and the other wrong, or one agrees with the full model and the other does not. Takes
a few minutes. `python -m benchmarks.figures` then writes the table.
"""

from __future__ import annotations

from typing import Any

from benchmarks import publishing
from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.run import questions_of, tower_once
from benchmarks.accuracy.store import MAIN, RESULTS, Results
from benchmarks.figures import CONFIRMED, LABELS, digest, labels
from tokencomp.cli import one_message
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.zoo import load
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import FRAMES

PER_FAMILY = 28


def compared(stored: PackedAnswers, again: PackedAnswers, rows: list[str]) -> dict[str, int]:
    """How many questions were asked again, and how many answers of some labels differ."""
    places = {name: i for i, name in enumerate(stored.questions.ids)}
    different = 0
    for label in rows:
        for k, name in enumerate(again.questions.ids):
            before = (stored.correct[label][places[name]], stored.agrees[label][places[name]])
            different += before != (again.correct[label][k], again.agrees[label][k])
    return {"asked": len(again.questions), "different": different}


def main() -> None:
    parser = publishing.parser(__doc__, CONFIRMED, report=False)
    parser.add_argument("--per-family", type=int, default=PER_FAMILY)
    parser.add_argument("--batch", type=int, default=40)
    parser.set_defaults(start=0, frames=FRAMES, difficulty="usual")
    args = parser.parse_args()
    facts = publishing.published_from(args.out, args.allow_dirty)
    stored = Results.read(RESULTS / MAIN, "test")
    rows = {name: [FULL, *labels(name)] for name in LABELS}
    wanted = {label: stored.settings[label] for some in rows.values() for label in some}
    settings = [Setting(s["reducer"], s["ratio"], s["options"]) for s in wanted.values()]
    examples = shapesqa(questions_of("test", stored.families, args), RESULTS / "media" / "test")
    model, processor = load(MAIN)
    how: dict[str, Any] = {"batch_size": args.batch, "frames": args.frames, "name": MAIN}
    with tower_once(model):
        runs = sweep(model, processor, examples, settings, **how)
    again = PackedAnswers.of({setting.label: run for setting, run in runs.items()}, FULL)
    found = {name: compared(stored.answers, again, some) for name, some in rows.items()}
    found = {name: {**one, "stored": digest(stored.answers, name)} for name, one in found.items()}
    publishing.write(args.out, {"about": {**publishing.environment(), **facts}, "rows": found})
    for name, one in found.items():
        print(f"{name}: {one['asked']} questions, {one['different']} answers differ")


if __name__ == "__main__":
    with one_message():
        main()
