"""The README: one screen, a script that runs as it stands, and figures of the result files."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from benchmarks import figures
from benchmarks.accuracy.report import record
from benchmarks.accuracy.store import ACCURACY, Results
from benchmarks.frontier import speedup
from benchmarks.frontier.page import Measured, points, stored
from tokencomp import zoo
from tokencomp.handle import ATTRIBUTE
from tokencomp.method import Method

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS_PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_script_prints_what_stands_below_it() -> None:
    match = re.search(r"```python\n((?:(?!```).)*)```\n\n```\n(.*?)```", README, re.DOTALL)
    assert match is not None
    script, output = match.groups()
    assert len([line for line in script.splitlines() if line]) <= 12
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(script, {})
    assert printed.getvalue() == output


def test_the_first_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, with an embedded model in place of the checkpoint and its download."""
    script = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    folder = zoo.SAMPLES.parent / "models" / "tiny-qwen2-vl"
    for auto in (transformers.AutoProcessor, transformers.AutoModelForImageTextToText):
        load = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", partial(_embedded, load, folder))
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((448, 448), 80).convert("RGB").save("photo.jpg")
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(script.replace("budget=512", "budget=30"), names)
    assert "144 → 30 visual tokens" in printed.getvalue()
    assert not hasattr(names["model"], ATTRIBUTE)


def _embedded(load: Callable[..., Any], folder: Path, name: str, **options: Any) -> Any:
    assert "/" in name  # a checkpoint, not an embedded model
    return load(folder, **options)


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


def sections(page: str) -> dict[str, list[list[str]]]:
    """Rows of the tables of a page, by the heading above them."""
    found: dict[str, list[list[str]]] = {}
    for part in (ROOT / page).read_text(encoding="utf-8").split("\n## ")[1:]:
        head, *lines = part.splitlines()
        found[head] = [line.split("|") for line in lines if line.startswith("|")]
    return found


def test_figures_of_the_text_are_those_of_their_pages() -> None:
    """The first token of an image with and without `tower_ratio`, and the price of a speedup."""
    text = " ".join(README.split())
    quarter = [
        line.split("|")
        for line in (ROOT / "benchmarks/models/tower.md").read_text().splitlines()
        if "one image of 1,024 tokens" in line and "one CPU thread, float32, sdpa, 1/4" in line
    ]
    times = {row[2].strip(): float(row[6].split("×")[0]) for row in quarter}
    said = re.search(r"came ([\d.]+) times as soon, and \[([\d.]+) times\]", text)
    keys = ("ratio 0.75", "ratio 0.75, tower ratio 0.6")
    assert said and [float(x) for x in said.groups()] == [round(times[key], 1) for key in keys]
    said = re.search(
        r"keep \[([\d.]+) %\]\S* of their right answers about images and ([\d.]+) % about clips at "
        r"half of the work, and ([\d.]+) and ([\d.]+) % with smaller",
        text,
    )
    assert said
    rows = [speedup.together(speedup.stored(), name, "test") for name in ("image", "video")]
    wanted = [100 * sum(row[i]) / sum(row[0]) for i in (2, 5) for row in rows]
    assert [*map(float, said.groups())] == pytest.approx(wanted, abs=0.051)
    steps = {
        (title, row[1].strip()): float(row[-2])
        for title, table in sections("benchmarks/models/decoding.md").items()
        for row in table
        if row[2].strip() == "0.75" and row[3].strip() == "merged, mask"
    }
    said = re.search(r"takes ([\d.]+) of its time .*? and ([\d.]+) after .*?; ([\d.]+) with", text)
    two, seven = "qwen2-vl-2b, 4 layers, bfloat16", "qwen2-vl-7b, 2 layers, bfloat16"
    wanted = [steps[two, "1,024"], steps[two, "16,384"], steps[seven, "16,384"]]
    assert said and [*map(float, said.groups())] == wanted


def test_the_recommended_settings_are_the_fastest_above_the_bar() -> None:
    """On validation questions, by the rule of the frontier: pages and "auto"."""
    found = {}
    for modality in ("image", "video"):
        measured = Measured(modality, *stored())
        good = [p for p in points() if measured.kept(p).value >= 0.97]
        best = max(good, key=measured.speed)
        assert best.depth == 0 and not best.smaller
        found[modality] = best.ratio, best.tower_ratio, round(measured.speed(best), 1)
    said = re.search(
        r"Of (\d+) settings, `ratio=([\d.]+), tower_ratio=([\d.]+)`.*?([\d.]+) times as soon; "
        r"on clips ([\d.]+) with ([\d.]+), ([\d.]+) times",
        " ".join(RESULTS_PAGE.split()),
    )
    assert said
    assert [float(x) for x in said.groups()] == [len(points()), *found["image"], *found["video"]]
    ratio, tower_ratio, _ = found["image"]
    assert Method(ratio=ratio, tower_ratio="auto").dropped_cells == pytest.approx(tower_ratio)
    methods = " ".join((ROOT / "docs/methods.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"images `ratio=(\S+), tower_ratio=(\S+)`, on clips (\S+) with (\S+),", methods
    )
    assert said
    wanted = [*found["image"][:2], *found["video"][:2]]
    assert [float(x) for x in said.groups()] == wanted


def test_counts_of_comparisons_are_those_of_the_page() -> None:
    """Better, equal, worse and significantly worse than the baselines, of all comparisons."""
    counts = [int(x) for x in pages_row("benchmarks/accuracy/baselines.md", "| all |")[1:]]
    every, better, _, equal, worse, significant, learned = counts
    text = " ".join((ROOT / "docs/evaluation.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"better in (\d+) of \[(\d+) comparisons\]\S+ equal in (\d+) and worse in (\d+) "
        r"\((\d+) significantly, (\d+) on",
        text,
    )
    assert said
    assert [int(x) for x in said.groups()] == [better, every, equal, worse, significant, learned]
    trust = (ROOT / "docs/trust.md").read_text(encoding="utf-8")
    said = re.search(
        r"\[(\d+) comparisons\]\S+ worse in (\d+), significantly in (\d+), in no", trust
    )
    assert said and learned == 0
    assert [int(x) for x in said.groups()] == [every, worse, significant]


def test_missed_bars_are_those_of_the_page() -> None:
    """Of the models that answered unseen questions; one without a row of images takes no videos."""
    bars = {"0.5": 97, "0.75": 97, "0.9": 94}
    missed = dict.fromkeys(((kind, ratio) for kind in ("images", "videos") for ratio in bars), 0)
    for rows in sections("benchmarks/accuracy/unseen/README.md").values():
        named = {row[1].strip(): row[2:5] for row in rows}
        cells = {kind: named.get(f"auto, {kind} alone") for kind in ("images", "videos")}
        cells["images"] = cells["images"] or named.get("**auto**")
        for kind, found in cells.items():
            for (ratio, bar), cell in zip(bars.items(), found or (), strict=False):
                missed[kind, ratio] += percent(cell) < bar
    count = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    said = re.search(
        r"met at 0.5, on images \*\*missed\*\* at 0.9 by (\w+) models of six, at 0.75 by (\w+), "
        r"on videos at 0.75 by (\w+) \|",
        (ROOT / "docs/trust.md").read_text(encoding="utf-8"),
    )
    assert said
    keys = [("images", "0.9"), ("images", "0.75"), ("videos", "0.75")]
    wanted = {key: count[word] for key, word in zip(keys, said.groups(), strict=True)}
    assert {key: number for key, number in missed.items() if number} == wanted


def test_dated_figures_of_the_text_are_those_of_their_pages() -> None:
    text = " ".join(RESULTS_PAGE.split())
    results = Results.read(ACCURACY / "unseen" / "tiny-qwen3-vl", "test")
    unseen = [record(results, f"auto-{ratio}") for ratio in ("0.75", "0.9")]
    said = re.search(r"([\d.]+) and ([\d.]+) % at 0.75 and 0.9 \(([\d-]+), \w+\)", text)
    assert said and {said[3]} == {row["date"] for row in unseen}
    wanted = [row["kept_images"] for row in unseen]
    assert [float(said[1]), float(said[2])] == pytest.approx([100 * v for v in wanted], abs=0.051)

    said = re.search(
        r"made, ([\d.]+) and ([\d.]+) % are right at 0.5 and 0.9 .*? has ([\d.]+) %", text
    )
    page = (ROOT / "benchmarks/nlvr/README.md").read_text(encoding="utf-8")
    full = re.search(r"full model answers\s([\d.]+) % right", page)
    cells = pages_row("benchmarks/nlvr/README.md", "| auto")[1:]
    assert said and full and [*said.groups()] == [cells[0], cells[3], full[1]]


def test_the_table_of_results_is_that_of_the_page() -> None:
    """Accuracy kept by the tiny Qwen3-VL, with the intervals, in docs/evaluation.md."""
    table = (ROOT / "docs/evaluation.md").read_text().split("### Accuracy")[1].split("\n\n")[2]
    for line in table.splitlines()[2:]:
        method, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        label = method.removesuffix(" (trained)")
        assert pages_row("benchmarks/accuracy/README.md", f"| {label}")[1:4] == cells, method
