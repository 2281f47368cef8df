"""The page of answers about sessions of drawn screens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.publishing import table
from recipes.screens.questions import KINDS

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
