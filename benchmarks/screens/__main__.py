"""How much of recorded screens is removable: counts on the pixels of ScreenAgent, no model.

    python -m benchmarks.screens FOLDER    # counts.json, sessions.csv, README.md beside this file
    python -m benchmarks.screens --report  # only the page

FOLDER is a checkout of the git repository niuzaisheng/ScreenAgent (data under Apache-2.0), or its
`data/ScreenAgent`. Nothing of it is stored here but counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.experiment import Experiment
from benchmarks.publishing import csv_text, table
from benchmarks.screens.cells import (
    CELL,
    FEWEST,
    SHARE,
    copies,
    differences,
    kept_of_session,
    picture,
    shift,
)
from tokencomp.errors import OptionError
from tokencomp.reducers._pixels import cells_of
from tokencomp.reducers.pixelprune import unpredicted_cells
from tokencomp.storage import write_text

THRESHOLDS = (0, 8, 16)
MAIN = 8  # what survives JPEG


def sessions(folder: Path) -> dict[str, list[Path]]:
    """Screenshots of every session, in the order of the times in their names."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.jpg")):
        if path.parent.name == "images":
            found.setdefault(path.parent.parent.name, []).append(path)
    if not found:
        raise OptionError(
            f"{folder} holds no screenshots. Give a checkout of niuzaisheng/ScreenAgent, in which "
            "they are data/ScreenAgent/*/SESSION/images/*.jpg."
        )
    return found


def clicks(session: Path) -> Iterator[tuple[str, int, int, str]]:
    """(screenshot, x, y, kind) of recorded mouse actions; scrolling has no place: -1."""
    seen: dict[tuple[str, str], None] = {}
    for path in sorted(session.glob("*.json")):
        record = json.loads(path.read_text())
        for action in record.get("actions") or ():
            if isinstance(action, dict) and action.get("action_type") == "MouseAction":
                place = action.get("mouse_position", {})
                x, y = place.get("width", -1), place.get("height", -1)
                kind = str(action["mouse_action_type"])
                key = record["saved_image_name"], f"{kind} {x} {y}"
                if key not in seen:
                    seen[key] = None
                    yield record["saved_image_name"], int(x), int(y), kind


def measure_session(paths: list[Path]) -> dict[str, Any]:
    """All counts of one session."""
    shown = [picture(path) for path in paths]
    kept = {t: kept_of_session(shown, t) for t in THRESHOLDS}
    pairs = [pair(a, b) for a, b in pairwise(shown) if a.shape == b.shape]
    numbers = {path.name: k for k, path in enumerate(paths)}
    return {
        "session": paths[0].parent.parent.name,
        "tokens": [k.numel() for k in kept[0]],
        "kept": {t: [int(k.sum()) for k in kept[t]] for t in THRESHOLDS},
        "pairs": pairs,
        "copies": [int(copies(one).sum()) for one in shown],
        "pixelprune": {t: [pixelprune(one, t) for one in shown] for t in (0, MAIN)},
        "clicks": [
            [kind, numbers[name], found]
            for name, x, y, kind in clicks(paths[0].parent.parent)
            if name in numbers
            for found in [target(kept[MAIN], numbers[name], x, y)]
        ],
    }


def pair(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Shares of cells without a change, and what a vertical shift explains."""
    largest = differences(before, after)
    moved, share = shift(before, after, largest > MAIN)
    return {
        "same": {t: float((largest <= t).float().mean()) for t in THRESHOLDS},
        "shift": [moved, round(share, 3)],
    }


def pixelprune(one: Tensor, threshold: int) -> int:
    return int(unpredicted_cells(cells_of(one, CELL)[None], threshold).sum())


def target(kept: list[Tensor], number: int, x: int, y: int) -> int | None:
    """In which screenshot, counted back from the current one, the target's cell was kept last."""
    row, column = y // CELL, x // CELL
    grid = kept[number]
    if x < 0 or y < 0 or row >= grid.shape[0] or column >= grid.shape[1]:
        return None
    back = 0
    while not kept[number - back][row, column]:
        back += 1
    return back


def quartiles(values: Any) -> list[float]:
    return [round(float(v), 4) for v in np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75))]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the page."""
    tokens = np.concatenate([row["tokens"] for row in rows]).astype(float)
    pairs = [p for row in rows for p in row["pairs"]]
    kept = {t: np.concatenate([row["kept"][t] for row in rows]) / tokens for t in THRESHOLDS}
    same = {t: np.array([p["same"][t] for p in pairs]) for t in THRESHOLDS}
    scrolled = [p for p in pairs if p["shift"][1] >= SHARE]
    lost = sum(p["shift"][1] * (1 - p["same"][MAIN]) for p in scrolled)
    found = [(kind, back) for row in rows for kind, _, back in row["clicks"]]
    backs = [back for kind, back in found if back is not None]
    return {
        "sessions": len(rows),
        "screens": len(tokens),
        "tokens": int(tokens.sum()),
        "pairs": len(pairs),
        "kept": {
            str(t): {
                "tokens": float((kept[t] * tokens).sum() / tokens.sum()),
                "screens": quartiles(kept[t]),
                "sessions": quartiles([sum(r["kept"][t]) / sum(r["tokens"]) for r in rows]),
            }
            for t in THRESHOLDS
        },
        "same": {
            str(t): {
                "mean": float(same[t].mean()),
                "median": float(np.median(same[t])),
                "whole screen": float((same[t] == 1).mean()),
            }
            for t in THRESHOLDS
        },
        "scrolled": {
            "pairs": len(scrolled),
            "share of pairs": len(scrolled) / len(pairs),
            "share of changed cells": lost / sum(1 - p["same"][MAIN] for p in pairs),
            "recorded": sum(kind.startswith("scroll") for kind, _ in found),
        },
        "copies": sum(sum(r["copies"]) for r in rows) / float(tokens.sum()),
        "pixelprune": {
            str(t): sum(sum(r["pixelprune"][t]) for r in rows) / float(tokens.sum())
            for t in (0, MAIN)
        },
        "clicks": {
            "places": len(backs),
            "in the last screenshot": sum(b == 0 for b in backs),
            "in an older one": sum(b > 0 for b in backs),
        },
    }


def per_session(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "session": row["session"][:8],
            "screens": len(row["tokens"]),
            "tokens": sum(row["tokens"]),
            **{f"delta {t}": sum(row["kept"][t]) for t in THRESHOLDS},
            "delta 8 by screen": " ".join(map(str, row["kept"][MAIN])),
            "copies": sum(row["copies"]),
            **{f"pixelprune {t}": sum(row["pixelprune"][t]) for t in (0, MAIN)},
            "scrolled pairs": sum(p["shift"][1] >= SHARE for p in row["pairs"]),
        }
        for row in rows
    ]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All sessions; their rows go to sessions.csv at once."""
    from tqdm import tqdm

    if args.folder is None:
        raise OptionError("give the FOLDER of the screenshots, or --report.")
    found = list(sessions(args.folder).values())[: args.limit or None]
    torch.set_num_threads(1)
    rows = [measure_session(paths) for paths in tqdm(found)]
    write_text(args.out.with_name("sessions.csv"), csv_text(per_session(rows)))
    yield {"summary": summary(rows)}


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


OPTIONS = {
    "FOLDER": (None, "checkout of niuzaisheng/ScreenAgent"),
    "limit": (0, "only so many sessions"),
}
EXPERIMENT = Experiment("screens/counts", measure, page, options=OPTIONS, readme=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
