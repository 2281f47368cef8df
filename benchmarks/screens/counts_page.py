"""The page of the counts on recorded screens."""

from __future__ import annotations

from typing import Any

from benchmarks.publishing import table
from benchmarks.screens.cells import CELL
from benchmarks.screens.scrolling import FEWEST, SHARE

HEAD = (
    "threshold",
    "tokens that stay",
    "by screen",
    "by session",
    "unchanged in a pair: mean, median",
    "pairs without a change",
)
TEXT = """# How much of recorded screens has a model already seen?

`python -m benchmarks.screens FOLDER`: {screens:,} screenshots in {sessions} sessions of
[ScreenAgent](https://github.com/niuzaisheng/ScreenAgent) (1024 × 768, JPEG; data under Apache-2.0),
in cells of {cell} × {cell} pixels, one visual token of Qwen3-VL: {tokens:,} tokens. `delta` keeps a
cell if a value differs by more than the threshold from the last kept cell at its place. The first
screenshot of a session is kept whole, and counted. Quartiles are those at 25, 50 and 75%.
[All sessions](sessions.csv).

{table}

- **Scrolling.** In {scrolled} of {pairs:,} pairs ({of_pairs}) one vertical shift explains at least
  {share} of the changed cells that hold something ({fewest} or more of them). There `delta` keeps
  what the model has seen at another place: {of_changed} of all changed cells. {recorded} recorded
  actions scroll.
- **Clicks.** Of {places} recorded mouse positions, {here} are in a cell that `delta` at 8 keeps in
  the screenshot that was acted on, and {older} in one that it drops there: the target's pixels are
  then in an older screenshot, at the same place, within the threshold. There are so many because
  ScreenAgent takes a screenshot each to plan, to act and to evaluate.
- **Inside one screenshot.** {copies} of the cells equal an earlier cell of the same screenshot in
  every bit. PixelPrune's rule keeps {exact} at threshold 0, and {near} at 8.
"""


def page(stored: dict[str, Any]) -> str:
    """The page of stored counts, see `summary` in `__main__`."""
    found, kept, same = (
        stored["summary"],
        stored["summary"]["kept"],
        stored["summary"]["same"],
    )
    rows = [
        [
            t,
            percent(kept[t]["tokens"]),
            " / ".join(percent(v) for v in kept[t]["screens"]),
            " / ".join(percent(v) for v in kept[t]["sessions"]),
            f"{percent(same[t]['mean'])}, {percent(same[t]['median'])}",
            percent(same[t]["whole screen"]),
        ]
        for t in kept
    ]
    scrolled, clicked = found["scrolled"], found["clicks"]
    return TEXT.format(
        screens=found["screens"],
        sessions=found["sessions"],
        tokens=found["tokens"],
        pairs=found["pairs"],
        cell=CELL,
        table=table(HEAD, rows, right=5),
        scrolled=scrolled["pairs"],
        of_pairs=percent(scrolled["share of pairs"]),
        of_changed=percent(scrolled["share of changed cells"]),
        recorded=scrolled["recorded"],
        share=f"{SHARE:.0%}",
        fewest=FEWEST,
        places=clicked["places"],
        here=clicked["in the last screenshot"],
        older=clicked["in an older one"],
        copies=percent(found["copies"]),
        exact=percent(found["pixelprune"]["0"]),
        near=percent(found["pixelprune"]["8"]),
    )


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"
