"""The page about clicks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.accuracy.packed import unpack
from benchmarks.publishing import table
from tokencomp.evaluation.metrics import difference


def page(stored: Mapping[str, Any]) -> str:
    """Markdown of stored answers."""
    training, tasks = stored["training"], np.array(stored["tasks"])
    bits = {row["look"]: np.array(unpack(row["right"], len(tasks))) for row in stored["rows"]}
    tokens = {row["look"]: row["tokens"] for row in stored["rows"]}
    whole = bits["whole, 400"]
    rows = [
        [name, f"{tokens[name]:,}", f"{100 * one.mean():.1f}",
         "" if one is whole else str(difference(one, whole))]
        for name, one in bits.items()
    ]  # fmt: skip
    return TEXT.format(
        count=len(tasks), screens=stored["screens"], steps=training["steps"],
        minutes=round(training["seconds"] / 60),
        date=training["date"][:10], area=100 * stored["area"],
        table=table(["screen", "visual tokens", "right clicks, %", "− whole, points"], rows),
        tasks=table(["task", "pages", *SHOWN.values()], [*_tasks(tasks, bits)]),
        unread=sum(row["unread"] for row in stored["rows"]),
    )  # fmt: skip


SHOWN = {
    "whole, 400": "whole",
    "budget=200": "budget=200",
    "budget=100": "budget=100",
    "budget=50": "budget=50",
    "budget=100 + zoom": "100 + zoom",
}


def _tasks(tasks: np.ndarray, bits: Mapping[str, np.ndarray]) -> Iterator[list[str]]:
    for task in sorted(set(tasks.tolist())):
        some = tasks == task
        yield [task, str(some.sum()), *(f"{100 * bits[n][some].mean():.0f}" for n in SHOWN)]


TEXT = """# Clicks

How many image tokens does a click need, and does a zoom help? The pages are those of MiniWoB++
(Liu et al., [1802.08802](https://arxiv.org/abs/1802.08802), MIT licence; nothing of it is copied
here), drawn by headless Chromium from seeds: ten tasks that one click solves. The page says
which clicks are right: the script tries every element.

```bash
pip install --no-deps miniwob        # and Chromium
python -m recipes.clicks.pages       # → build/clicks/*.npz
python -m recipes.clicks.build       # trains; goes on where it stopped
python -m benchmarks.clicks          # → results.json, README.md
```

A screen of 560 × 560 px shows four pages in its quarters, so that an instruction has to be found as
well: 400 visual tokens for a tiny Qwen3-VL. It was trained on other seeds of the same tasks, on
whole screens, smaller pictures and quarters, without compression: {steps:,} steps, {minutes}
minutes on one core that other programs used too ({date}; the recipe as committed in 642d16d0). It
answers with two of 128 coordinate tokens, in 64ths of what it sees. {count} instructions on
{screens} screens of unseen seeds were asked alone, greedily. The largest right element covers
{area:.1f} % of a screen.

{table}

`budget=` is `patch(model, budget=…)` on the whole screen, the default reducer. A smaller picture
is scaled before the tower. "+ zoom" looks twice: the click of the first look, then the quarter of
the screen around it at full resolution (100 visual tokens; both looks are counted), and
[`Region`](../../docs/agents.md#zoom) leads the second click back to the screen. In brackets: paired
95 % score intervals.

**Half of the tokens cost no click here, a quarter costs seven points and an eighth twelve; a zoom
more than makes up for that.** A first look with an eighth of the tokens and a second at full
resolution have more right clicks than the whole screen, with three eighths of its tokens. Where to
look needs few tokens; where exactly to click needs a large picture of the target. For this model a
smaller picture is the better first look: no part of the screen is missing from it.

## By task

{tasks}

Right clicks in %. {unread} of all answers had no coordinates. The tiny model reads few words
(`click-link`) and few shapes; these pages say little about compression. Nothing was chosen on
the test pages: looks and tasks were fixed before the first answer, and the recipe was changed once,
after a look at pages of the validation seeds. Screens of a large model have ten times as many
tokens; the shares of tokens carry over at best, the numbers do not.
"""
