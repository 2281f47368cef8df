"""The README: one screen, a script that runs as it stands, and figures of the result files."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from benchmarks import figures

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_script_prints_what_stands_below_it() -> None:
    match = re.search(r"```python\n((?:(?!```).)*)```\n\n```\n(.*?)```", README, re.DOTALL)
    assert match is not None
    script, output = match.groups()
    assert len([line for line in script.splitlines() if line]) <= 12
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(script, {})
    assert printed.getvalue() == output


def below(link: str, text: str) -> list[float]:
    """Numbers of the row with this text, below the row with this link or the row itself."""
    names, above = [], ""
    for line in README.split("## How fast")[1].splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = re.search(r"\]\((benchmarks/.*?)\)", first)
        above = found[1] if found else above
        if len(cells) == 4 and above == link and text in first:
            names.append([float(cell.rstrip("%")) for cell in cells[:3]])
    assert len(names) == 1, (link, text)
    return names[0]


RATIOS = (0.5, 0.75, 0.9)
DEFAULT, DROP, RANDOM = "with the default method", "with `merge=False`", "with `random` dropping"


@pytest.mark.parametrize(
    ("media", "method"), [("video", "auto"), ("image", "auto"), ("image", "auto merge=False")]
)
def test_the_speed_is_the_measured_one(media: str, method: str) -> None:
    records = figures.speed_records()[media, method]
    text = DROP if "merge=False" in method else f"{media} of 4,096 tokens"
    found = below("benchmarks/models/prefill.md", text)
    assert found == [round(records[ratio]["speedup"], 1) for ratio in RATIOS]


def pages_row(page: str, start: str) -> list[str]:
    """Cells of the first row of a page that begins like `start`."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def percent(cell: str) -> float:
    return float(cell.partition("%")[0])


def test_the_accuracy_kept_is_that_of_the_page() -> None:
    page = "benchmarks/accuracy/README.md"
    methods = {DEFAULT: "**auto**", DROP: "auto merge=False", RANDOM: "random (3 seeds)"}
    for text, label in methods.items():
        cells = pages_row(page, f"| {label} |")[1:4]
        assert below(page, text) == [percent(cell) for cell in cells]


def test_every_row_of_figures_names_release_date_and_commit() -> None:
    table = figures.readme_table(figures.figures())
    assert table in README, "run python -m benchmarks.figures"
    for line in table.splitlines()[2:]:
        assert re.search(r"\| \d+\.\d+\.\d+, \d{4}-\d\d-\d\d, [0-9a-f]{8} \|$", line), line
