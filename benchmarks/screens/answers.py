"""What a tiny model answers about sessions of screens, with and without `delta`, per budget.

    python -m benchmarks.screens.answers            # answers.json, answers.md
    python -m benchmarks.screens.answers --report   # only the page

Needs the three models of `python -m recipes.screens.build` (plain, `--longer` and `--delta`). All
of them answer the same test questions, greedily, one at a time; `--only NAME` asks one of them, so
that they can be asked at the same time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.publishing import table
from recipes.screens.build import FOLDER
from recipes.screens.questions import FAMILIES, KINDS, Item, item, place
from tokencomp.inputs.loading import load_folder
from tokencomp.inputs.prompts import build_inputs
from tokencomp.pages.pictures import survival

MODELS = ("full", "longer", "delta")
TRAINING = ("seed", "stages", "finished", "seconds", "training_scores")
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "delta 0": {"reducer": "delta", "threshold": 0},
    "delta 8": {"reducer": "delta", "threshold": 8},
    "budget 18": {"budget": 18},
    "budget 9": {"budget": 9},
    "delta 8, budget 18": {"reducer": "delta", "threshold": 8, "budget": 18},
    "delta 8, budget 9": {"reducer": "delta", "threshold": 8, "budget": 9},
}


@contextmanager
def compressed(model: Any, how: dict[str, Any]) -> Iterator[Any]:
    """The handle of a patch, None for the whole model; undone afterwards."""
    if not how:
        yield None
        return
    handle = tokencomp.patch(model, **how)
    try:
        yield handle
    finally:
        tokencomp.unpatch(model)


def ask(model: Any, processor: Any, question: Item, how: dict[str, Any]) -> dict[str, Any]:
    """One answer, and where the target's cell is kept.

    `kept` is the share of tokens in the last decoder layer; `here` says whether the cell with the
    middle of the widget is kept in the last screenshot, `somewhere` in one that shows the widget
    with the same looks.
    """
    pictures = [Image.fromarray(frame) for frame in question.frames]
    inputs = build_inputs(processor, [pictures], [question.question])
    with compressed(model, how) as handle, torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        masks = _masks(handle, len(pictures))
    text = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
        0
    ].strip()
    column, row = place(question.widget)
    shown = [bool(mask[row, column]) for mask in masks[question.widget.since :]]
    return {
        "right": text == question.answer,
        "kept": float(np.mean([mask.mean() for mask in masks])),
        "kept of the last": float(masks[-1].mean()),
        "here": shown[-1],
        "somewhere": any(shown),
    }


def _masks(handle: Any, pictures: int) -> list[np.ndarray]:
    if handle is None:
        return [np.ones((6, 6), bool)] * pictures
    last = survival(handle.stats, len(handle.stats.layers) - 1)
    return [share[0] == 1 for share in last]


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of one model, setting and family."""
    count = len(records)
    seen = [r for r in records if r["somewhere"]]
    return {
        "questions": count,
        "right": sum(r["right"] for r in records),
        "kept": sum(r["kept"] for r in records) / count,
        "kept of the last": sum(r["kept of the last"] for r in records) / count,
        "here": sum(r["here"] for r in records),
        "somewhere": len(seen),
        "right where kept": sum(r["right"] for r in seen),
    }


def guess(items: list[Item]) -> float:
    """Share that the commonest answer of these very questions gets right: blind, and favoured."""
    answers = [one.answer for one in items]
    return max(answers.count(a) for a in set(answers)) / len(answers)


def answered(folder: Path, asked: dict[str, list[Item]], facts: dict[str, Any]) -> dict[str, Any]:
    """All settings and families of one model; kept beside it, for the page of all models."""
    from tqdm import tqdm

    stored = folder / "answers.json"
    identity = {"per_family": len(next(iter(asked.values()))), **facts}
    if stored.exists() and (known := json.loads(stored.read_text()))["identity"] == identity:
        return known
    model, processor = load_folder(str(folder / "model"))
    rows = []
    for setting, how in SETTINGS.items():
        for family, items in tqdm(asked.items(), f"{folder.name}, {setting}"):
            found = [ask(model, processor, one, how) for one in items]
            row = {"model": folder.name, "setting": setting, "family": family}
            rows.append(row | summary(found))
    trained = json.loads((folder / "model" / "training.json").read_text())
    training = {name: trained[name] for name in TRAINING}
    result = {"identity": identity, "training": training, "rows": rows}
    publishing.write(stored, result)
    return result


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All models, or with `--only` one of them, for a later page."""
    facts = publishing.published_from(args.out, args.allow_dirty)
    torch.set_num_threads(1)
    asked = {f: [item("test", f, k) for k in range(args.per_family)] for f in FAMILIES}
    chosen = [args.only] if args.only else MODELS
    found = {name: answered(args.models / name, asked, facts) for name in chosen}
    if not args.only:
        yield {
            "per_family": args.per_family,
            "blind": {family: guess(items) for family, items in asked.items()},
            "training": {name: one["training"] for name, one in found.items()},
            "rows": [row for one in found.values() for row in one["rows"]],
        }


LEARNED = 0.25
"""Above a blind guess without compression: less, and a family counts as not learned."""
NAMES = {
    "full": "without `delta`",
    "longer": "without `delta`, trained longer (control)",
    "delta": "trained longer with `delta`",
}
TEXT = """# Does a model still use what only an older screenshot shows?

`python -m recipes.screens.build`, again with `--longer` and with `--delta`, then
`python -m benchmarks.screens.answers`. Sessions of two to four drawn screens of 168 × 168 pixels
(36 tokens each; buttons, fields, icons, a pointer; three quarters of the sessions through JPEG), of
which small parts change, and a question about the last one: "What does the red text say?" (`read`),
"What color is the star?" (`icon`), "Where is moon?" (`click`: column and row of the cell).
**Changed**: the widget got its looks in the last screen. **Unchanged**: `delta` at threshold 8
drops every cell of it there, so that the answer is in an older screen alone. {per_family} test
questions of each of {families} families, the same for every row; greedy answers, right if equal.

{short}

- In training without `delta` all answers are in the last screen, so that the model never had to
  look at an older one. Half of every screen (`budget 18`) costs it less than `delta`, which keeps
  more.
- **Not learned** in the steps with `delta`: reading unchanged text ({read} right), and clicks on
  changed parts ({click}), although their cells are kept.

{answers}

{learned}

## Clicks by budget

A target counts as kept if the cell with its middle is kept in a screen that shows it with its
present looks. Of all {clicks} click questions:

{targets}

## How the models were made

One tiny Qwen3-VL (2.3 M parameters), one seed, `tiny-qwen3-vl-hard` as the start, one thread of a
busy machine:

{training}

The first two stages ran before the loss on colours was added, with a rate that fell a little
differently. In the stage with `delta`, {share:.0%} of the batches drop what it drops, at a
threshold of 0 or 8. How much a large model loses, which was trained on other sequences, is not
known.

[All rows](../README.md#tables-as-csv).
"""
SHORT = (
    ("full", "whole"),
    ("full", "delta 8"),
    ("longer", "delta 8"),
    ("delta", "delta 8"),
    ("delta", "whole"),
    ("full", "budget 18"),
    ("full", "budget 9"),
)
SHARE = 0.7


def page(stored: dict[str, Any]) -> str:
    """The page of what `answers` stored."""
    rows = {(r["model"], r["setting"], r["family"]): r for r in stored["rows"]}
    models = list(dict.fromkeys(model for model, *_ in rows))
    settings = list(dict.fromkeys(setting for _, setting, _ in rows))
    families = list(stored["blind"])
    parts = [f"- {NAMES[name]}: {_stages(facts)}" for name, facts in stored["training"].items()]
    return TEXT.format(
        per_family=stored["per_family"],
        families=len(families),
        answers="\n\n".join(
            f"**Model {NAMES[model]}**\n\n{_answers(rows, model, settings, families)}"
            for model in models
        ),
        short=_short(rows),
        read=_share(rows["delta", "delta 8", "read_unchanged"]),
        click=_share(rows["delta", "delta 8", "click_changed"]),
        learned=_learned(rows, stored["blind"]),
        clicks=2 * stored["per_family"],
        targets=table(
            ["model", "setting", "target kept", "right", "right where kept"],
            [
                [NAMES[model], f"`{setting}`", *_clicks(rows, model, setting)]
                for model in models
                for setting in settings
            ],
            right=3,
        ),
        training="\n".join(parts),
        share=SHARE,
    )


def _share(row: dict[str, Any]) -> str:
    return f"{row['right'] / row['questions']:.0%}"


def _short(rows: Any) -> str:
    """Right answers of all families about changed and unchanged parts, of the rows that matter."""
    body = []
    for model, setting in SHORT:
        shares = []
        for state in ("changed", "unchanged"):
            found = [rows[model, setting, f"{kind}_{state}"] for kind in KINDS]
            asked = sum(row["questions"] for row in found)
            shares.append(f"{sum(row['right'] for row in found) / asked:.0%}")
        body.append([NAMES[model], f"`{setting}`", *shares])
    return table(["model", "setting", "changed parts", "unchanged parts"], body, right=2)


def _stages(facts: dict[str, Any]) -> str:
    steps = " + ".join(f"{n} {name}" for name, n in facts["stages"].items())
    end = "" if facts["finished"] else ", stopped early"
    return f"steps: {steps}{end}; {facts['seconds'] / 60:.0f} minutes"


def _answers(rows: Any, model: str, settings: Sequence[str], families: Sequence[str]) -> str:
    body = []
    for setting in settings:
        found = [rows[model, setting, family] for family in families]
        kept = sum(row["kept"] for row in found) / len(found)
        body.append([f"`{setting}`", f"{kept:.0%}", *map(_share, found)])
    head = ["setting", "tokens kept", *(family.replace("_", ", ") for family in families)]
    return table(head, body, right=len(head) - 1)


def _learned(rows: Any, blind: dict[str, float]) -> str:
    """Which families the models have learned without compression, and which not."""
    first = next(iter(rows))[0]
    shares = {
        f: rows[first, "whole", f]["right"] / rows[first, "whole", f]["questions"] for f in blind
    }
    missing = [f for f in blind if shares[f] - blind[f] < LEARNED]
    guesses = ", ".join(f"{f.replace('_', ' ')} {share:.0%}" for f, share in blind.items())
    if missing:
        names = ", ".join(f.replace("_", " ") for f in missing)
        said = f"**Not learned**, so that its rows show nothing: {names}."
    else:
        said = "All families were learned."
    return f"{said} The commonest answer of the questions would be right in: {guesses}."


def _clicks(rows: Any, model: str, setting: str) -> list[str]:
    found = [rows[model, setting, f"click_{state}"] for state in ("changed", "unchanged")]
    asked, kept, right, both = (
        sum(row[name] for row in found)
        for name in ("questions", "somewhere", "right", "right where kept")
    )
    return [
        f"{kept / asked:.0%}", f"{right / asked:.0%}", f"{both / kept:.0%}" if kept else "–"
    ]  # fmt: skip


OPTIONS = {
    "models": (FOLDER, "folder of the three models"),
    "only": (None, "only ask this model, for a later page", MODELS),
    "per_family": 40,
}
EXPERIMENT = Experiment("screens/answers", measure, page, lambda stored: stored["rows"], OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
