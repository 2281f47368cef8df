"""The README: one screen, a script that runs as it stands, and figures of the result files."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import confirm, figures
from benchmarks.accuracy.packed import PackedAnswers, Questions
from benchmarks.models.measured import prefill_speed
from tokencomp.evaluation.environment import git

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
        if len(cells) == 3 and above == link and text in first:
            names.append([float(cell.rstrip("%")) for cell in cells])
    assert len(names) == 1, (link, text)
    return names[0]


RATIOS = (0.5, 0.75, 0.9)
DEFAULT, DROP, RANDOM = "with the default method", "with `merge=False`", "with `random` dropping"


@pytest.mark.parametrize(
    ("media", "method"), [("video", "auto"), ("image", "auto"), ("image", "auto merge=False")]
)
def test_the_speed_is_the_measured_one(media: str, method: str) -> None:
    page, speed = "benchmarks/models/prefill.md", prefill_speed()
    assert tuple(speed.ratios) == RATIOS
    known = {(kind, name): v for model, kind, n, name, v in speed.rows if n == 4096}
    if (media, method) == ("video", "auto") and (media, method) not in known:
        method = "condiv"  # until the default is measured
    if (media, method) not in known:
        pytest.skip("not measured yet")
    text = DROP if "merge=False" in method else f"{media} of 4,096 tokens"
    assert below(page, text) == [round(value, 1) for value in known[media, method]]


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


@pytest.mark.long
def test_every_figure_is_of_todays_code_or_says_of_which_it_is() -> None:
    """The commit of a figure exists and what it measures is unchanged, or the row names both."""
    if not (ROOT / ".git").exists() or git(ROOT, "rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("no history")
    missing = {path for f in figures.figures() for path in f.code if not (ROOT / path).exists()}
    assert not missing, "code that moved is watched no longer"
    for figure in figures.figures():
        row = f"{figure.text}{{}} | {' | '.join(figure.values)} |"
        unmarked = row.format("") in README
        assert unmarked or row.format(figure.mark) in README, f"no such row: {row.format('')}"
        reason = figures.outdated(figure)
        assert not (unmarked and reason), (
            f"{figure.text}: {reason}. Measure again, ask again (python -m benchmarks.confirm), or "
            "mark the row as older: python -m benchmarks.figures"
        )


def test_a_changed_answer_is_found() -> None:
    """Right instead of wrong, and another wrong answer: of the questions that were asked again."""
    asked = Questions(("a", "b", "c"), ("f",) * 3, ("x",) * 3, "")
    stored = PackedAnswers(
        asked, {"m": [1, 0, 0], "n": [1, 1, 1]}, {"m": [1, 0, 1], "n": [1, 1, 0]}
    )
    part = Questions(("c", "b"), ("f",) * 2, ("x",) * 2, "")
    again = PackedAnswers(part, {"m": [0, 1], "n": [1, 1]}, {"m": [0, 0], "n": [0, 1]})
    assert confirm.compared(stored, again, ["m", "n"]) == {"asked": 2, "different": 2}
    assert confirm.compared(stored, again, ["n"]) == {"asked": 2, "different": 0}


@pytest.fixture
def history(tmp_path: Path) -> Callable[[str], str]:
    """A repository; `commit("path")` or `commit("path: text")` changes a file and returns the new
    commit.
    """
    root, count = tmp_path, itertools.count()

    def commit(path: str) -> str:
        path, _, text = path.partition(": ")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text or f"{next(count)}")
        git(root, "add", "-A")
        git(root, "-c", "user.name=n", "-c", "user.email=e@e", "commit", "-qm", path)
        return git(root, "rev-parse", "HEAD")

    git(root, "init", "-q")
    return commit


ENGINE, OTHER, PAGE = "tokencomp/engine/a.py", "tokencomp/reducers/tango.py", "benchmarks/a.md"


@pytest.mark.parametrize(
    ("later", "again", "reason"),
    [
        ([OTHER, PAGE], {}, ""),
        ([PAGE, ENGINE], {}, "changed since"),
        ([f"{ENGINE}: 'prose'\n0  # and a comment"], {}, ""),  # the first text was 0
        ([f"{ENGINE}: 'prose'\n1"], {}, "changed since"),
        (["tokencomp/reducers/kcenter.py"], {}, "changed since"),
        (["tokencomp/reducers/condiv.py"], {}, "changed since"),
        ([ENGINE, PAGE], {"asked": 308, "different": 0}, ""),
        ([ENGINE, PAGE], {"asked": 308, "different": 1}, "1 of 308"),
        ([ENGINE, PAGE], {"asked": 30, "different": 0}, "0 of 30"),
        ([ENGINE, PAGE], {"asked": 308, "different": 0, "dirty": "+dirty"}, "uncommitted"),
        ([ENGINE, "confirm", ENGINE], {"asked": 308, "different": 0}, "changed since"),
    ],
)
def test_a_figure_is_outdated_once_what_it_measures_has_changed(
    history: Callable[[str], str], tmp_path: Path, later: list[str], again: Any, reason: str
) -> None:
    """Confirmed at the commit "confirm", else at the last one."""
    first = history(ENGINE)
    commits = {path: history(path) for path in later}
    if again:
        place = commits.get("confirm", commits[later[-1]]) + again.get("dirty", "")
        again = {**again, "commit": place, "date": "2026-01-02"}
    run = {"commit": first, "date": "2026-01-01"}
    figure = figures.Figure("", "auto", [], run, again or None)
    found = figures.outdated(figure, tmp_path)
    assert reason in found and bool(found) == bool(reason)
