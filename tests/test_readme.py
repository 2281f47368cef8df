"""The README: one screen, a script that runs as it stands, and figures of the result files."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from statistics import mean
from typing import Any

from tokencomp.pages.measured import prefill_speed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_one_screen() -> None:
    assert len(README.splitlines()) <= 90


def test_the_script_prints_what_stands_below_it() -> None:
    match = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL)
    assert match is not None
    script, output = match.groups()
    assert len([line for line in script.splitlines() if line]) <= 12
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(script, {})
    assert printed.getvalue() == output


def rows() -> dict[str, list[float]]:
    """The numbers of the table of speed and accuracy, by the link of a row or its text."""
    above, table = "", {}
    for line in README.split("## How fast")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [re.fullmatch(r"([\d.]+)%?", cell) for cell in cells[1:]]
        if len(cells) == 4 and all(numbers):
            link = re.search(r"\]\((.*?)\)", cells[0])
            above = link[1] if link else above
            name = above if link else f"{above} {cells[0]}"
            table[name] = [float(number[1]) for number in numbers if number]
    assert len(table) == 7
    return table


RATIOS = (0.5, 0.75, 0.9)
RANDOM = "the same with `random` dropping"
DROP = 'the same with `rest="drop"`'


def test_the_speed_is_the_measured_one() -> None:
    speed: Any = prefill_speed()
    (values,) = [row[-1] for row in speed.rows if row[:3] == ("qwen2-vl-2b", "video", 4096)]
    assert tuple(speed.ratios) == RATIOS
    assert rows()["benchmarks/models/prefill.md"] == [round(value, 1) for value in values]


def pages_row(page: str, start: str) -> list[str]:
    """Cells of the first row of a page that begins like `start`."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def percent(cell: str) -> float:
    return float(cell.partition("%")[0])


def test_the_accuracy_kept_is_that_of_the_page() -> None:
    page, table = "benchmarks/accuracy/summary.md", rows()
    for name, start in (
        (page, "| **auto** |"),
        (f"{page} {DROP}", "| auto rest=drop |"),
        (f"{page} {RANDOM}", "| random |"),
    ):
        assert table[name] == [percent(cell) for cell in pages_row(page, start)[1:4]]


def test_the_answers_about_photographs_are_those_of_the_page() -> None:
    page, table = "benchmarks/real/README.md", rows()
    full = percent(pages_row(page, "| full | 0 |")[5])
    assert f"({full}% without compression)" in README
    accuracy = {
        name: [
            mean(percent(pages_row(page, f"| {label} | {ratio} |")[5]) for label in labels)
            for ratio in RATIOS
        ]
        for name, labels in (
            (page, ["auto"]),
            (f"{page} {DROP}", ["auto rest=drop"]),
            (f"{page} {RANDOM}", [f"random seed={seed}" for seed in range(3)]),
        )
    }
    for name, values in accuracy.items():
        assert table[name] == [round(value, 1) for value in values]
