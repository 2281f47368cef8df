"""Reports: tables, comparisons and lost items, against brute force over raw record files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.console import run

from tokencomp.evaluation import Setting, mcnemar, retention, sweep
from tokencomp.evaluation.comparisons import comparisons, losses, paired_tests
from tokencomp.evaluation.group_runs import find_runs
from tokencomp.evaluation.metrics import McNemar
from tokencomp.evaluation.runs import averaged
from tokencomp.pages import report
from tokencomp.pages.lost import draw_lost, read_lost, write_lost
from tokencomp.pages.report import Line, lines
from tokencomp.pages.report import lines as find_lines
from tokencomp.reducers.registry import make_reducer

IDENTITY = {"model": "m", "dtype": "float32", "frames": 8}


def write_run(root: Path, reducer: str, ratio: float, scores: dict[str, int], **more) -> Path:
    """A run folder by hand."""
    folder = root / f"{reducer}-{ratio}"
    folder.mkdir(parents=True)
    identity = {**IDENTITY, "reducer": reducer, "ratio": ratio, "options": {}, **more}
    manifest = {
        "identity": identity, "finished": True, "command": "tokencomp eval", "date": "today",
        "commit": None, "versions": {"torch": "2"}, "batch_size": 8, "batch_halved_by_oom": False,
        "hardware": {"cpu": "c", "cores": 2, "threads": 1, "gpus": []},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    cost = {"ratio": ratio, "flops": 100 * (1 - ratio), "kv_bytes": 10, "seconds": 0.5}
    lines = [
        {"id": k, "family": k[0], "prediction": "", "answer": "", "correct": bool(v), **cost}
        for k, v in scores.items()
    ]
    lines.append({"id": "broken", "family": "a", "error": "no frame of this video"})
    (folder / "records.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    root = tmp_path / "runs"
    write_run(root, "full", 0.0, {"a1": 1, "a2": 1, "a3": 1, "b1": 0, "b2": 1, "b3": 1})
    write_run(root, "random", 0.5, {"a1": 0, "a2": 1, "a3": 0, "b1": 0, "b2": 0, "b3": 1})
    write_run(root, "aim", 0.5, {"b3": 1, "a1": 1, "a2": 1, "a3": 0, "b1": 1, "b2": 1})
    return root


def rows(*folders: Path) -> list[Line]:
    """The table of `tokencomp report`."""
    return lines(find_runs(folders))


def test_table_is_paired_by_item(runs):
    full, random, aim = rows(runs)
    assert (full.accuracy, random.accuracy, aim.accuracy) == (5 / 6, 2 / 6, 5 / 6)
    order = [1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]
    expected = retention(*order)
    assert aim.retention.value == expected.value == 1.0
    found = mcnemar([1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 0, 1])
    assert aim.against_random == McNemar(3, 0, found.p) and found.p == 0.25
    assert aim.families == {"a": 2 / 3, "b": 1.0}
    assert len(aim.run.failed) == 1 and aim.flops == 0.5


def test_the_table_as_files_holds_the_same_numbers(runs, tmp_path, capsys):
    """CSV for programs, LaTeX for papers; the page loads nothing from elsewhere."""
    page, files = tmp_path / "r.html", (tmp_path / "t.csv", tmp_path / "t.tex")
    assert run("report", runs, "-o", page, "--table", files[0], "--table", files[1]) == 0
    with files[0].open() as file:
        full, random, aim = csv.DictReader(file)
    assert [float(row["accuracy"]) for row in (full, random, aim)] == [5 / 6, 2 / 6, 5 / 6]
    assert (full["retention"], aim["failed"], float(random["retention"])) == ("", "1", 2 / 5)
    assert [row["method"] for row in (full, random, aim)] == ["full", "random", "aim"]
    assert float(aim["against_random"]) == pytest.approx(3 / 6)
    low, high = (100 * float(aim[f"retention_{end}"]) for end in ("low", "high"))
    assert rf"aim & 0.5 & 83.3\% & 100.0\% [{low:.1f}\%, {high:.1f}\%]" in files[1].read_text()
    content = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', content)
    assert "no frame of this video" in content, "what failed is named"


def test_rows_and_shares_are_of_the_same_items(tmp_path):
    """The full model works 100 on a1 and 300 on a2; aim 30 on a1 and 90 on a2.

    Shares are 120 of 400 and not 60 of 300. Where a2 fails under aim, 30 of 100 are left.
    """

    def put(name, ratio, scores, flops, failed=()):
        folder = write_run(tmp_path / "r", name, ratio, scores)
        read = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        costs = [{**row, "flops": n} for row, n in zip(read, flops, strict=False)]
        costs = [{"id": r["id"], "error": "big"} if r["id"] in failed else r for r in costs]
        text = [json.dumps(row) + "\n" for row in [*costs, read[-1]]]
        (folder / "records.jsonl").write_text("".join(text))
        return folder

    whole = put("full", 0.0, {"a1": 1, "a2": 1}, [100, 300])
    part = put("aim", 0.5, {"a1": 1, "a2": 0}, [30, 90])
    full, aim = rows(whole, part)
    assert (len(full.run.answered), full.accuracy) == (2, 1.0)
    assert (aim.flops, aim.kv_bytes, aim.accuracy) == (0.3, 1.0, 0.5)
    gone = put("prune", 0.5, {"a1": 1, "a2": 0}, [30, 90], failed=("a2",))
    *_, prune = rows(whole, gone)
    assert (prune.flops, len(prune.run.answered), len(prune.run.failed)) == (0.3, 1, 2)


def test_an_item_that_failed_with_one_seed_failed(tmp_path):
    """Whichever seed it was: one of two seeds of `random` has no answer to question a2."""
    for failed in (0, 1):
        parts, scores = [tmp_path / f"{failed}-{seed}" for seed in (0, 1)], {"a1": 1, "a2": 1}
        runs = [
            write_run(part, "random", 0.5, scores, options={"seed": seed})
            for seed, part in enumerate(parts)
        ]
        edit_records(runs[failed], error="no frame of this video")
        (both,) = averaged(find_runs(runs))
        assert both.scores == {"a1": 1.0}
        assert [r["id"] for r in both.failed] == ["a2", "broken"]


def edit_records(folder: Path, **fields: object) -> None:
    """Give the record of question a2 other fields."""
    file = folder / "records.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**row, **(fields if row["id"] == "a2" else {})} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_manifest(folder: Path, **fields: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


REFUSED = {
    "another number of frames": (
        lambda runs: write_run(runs, "prune", 0.5, {"a1": 1}, frames=16),
        "differ in frames: 8 and 16",
    ),
    "other questions": (lambda runs: only(runs, "c1"), "are of different questions (7 and 1)"),
    "two runs of one setting": (
        lambda runs: shutil.copytree(runs / "aim-0.5", runs / "again"),
        "are runs of one setting",
    ),
    "no full model": (lambda runs: shutil.rmtree(runs / "full-0.0"), "full model is missing"),
    "unfinished": (
        lambda runs: edit_manifest(runs / "aim-0.5", finished=False),
        "goes on where it stopped",
    ),
    **{
        field: (
            lambda runs, field=field: [
                edit_records(runs / name, **{field: name}) for name in ("full-0.0", "aim-0.5")
            ],
            f"differ in the {words} of question 'a2'",
        )
        for field, words in (
            ("media", "pictures, clips or sounds"),
            ("prompt", "words"),
            ("answer", "right answer"),
        )
    },
    "lost records": (
        lambda runs: edit_manifest(runs / "aim-0.5", summary={"items": 9, "failed": 1}),
        "records of 7 items, and its manifest says 10",
    ),
}


def only(runs: Path, name: str) -> None:
    """A run that answered this question alone."""
    file = write_run(runs, "prune", 0.5, {name: 1}) / "records.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")


@pytest.mark.parametrize("case", REFUSED)
def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, capsys, case):
    """The pictures of a question were replaced between two runs, say."""
    damage, message = REFUSED[case]
    damage(runs)
    assert run("report", runs, "-o", tmp_path / "x.html") == 2
    assert message in " ".join(capsys.readouterr().err.split())


ITEMS = [f"{group}{k}" for group in "ab" for k in range(8)]


@pytest.fixture
def runs_comparisons(tmp_path):
    """Full, two seeds of random, downscaling and one method; answers drawn at random."""
    rng = np.random.default_rng(0)
    said = {}
    for name, ratio, options in (
        ("full", 0.0, {}),
        ("random", 0.5, {}),
        ("random", 0.5, {"seed": 1}),
        ("downscale", 0.5, {}),
        ("aim", 0.5, {}),
        ("random", 0.9, {}),
    ):
        scores = dict(zip(ITEMS, rng.integers(0, 2, len(ITEMS)).tolist(), strict=True))
        if name == "aim":  # all of group a right, none of group b
            scores = {i: int(i[0] == "a") for i in ITEMS}
        seed = f"-{options['seed']}" if options else ""
        folder = write_run(tmp_path / f"x{seed}", name, ratio, scores, options=options)
        path = folder / "records.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["prediction"] = str(rng.choice(["red", "rust", "blue "]))
        if name == "downscale":  # it never answered the first question
            rows[0] = {"id": rows[0]["id"], "family": "a", "error": "too large"}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        kept = {row["id"]: row for row in rows if "error" not in row}
        said[name + seed, ratio] = kept
    return find_runs(sorted(tmp_path.glob("x*"))), said


def _find(every, name, ratio):
    return next(r for r in every if (r.identity["reducer"], r.ratio) == (name, ratio))


def test_columns_equal_brute_force(runs_comparisons):
    every, said = runs_comparisons
    ours = comparisons(_find(every, "aim", 0.5), every)
    aim, full, small = said["aim", 0.5], said["full", 0.0], said["downscale", 0.5]
    a, b = said["random", 0.5], said["random-1", 0.5]
    n = len(ITEMS)
    assert ours.full.value == pytest.approx(
        sum(aim[i]["correct"] for i in ITEMS) / n - sum(full[i]["correct"] for i in ITEMS) / n
    )
    luck = sum(a[i]["correct"] + b[i]["correct"] for i in ITEMS) / (2 * n)
    assert ours.random.value == pytest.approx(sum(aim[i]["correct"] for i in ITEMS) / n - luck)
    assert ours.seeds == 2
    blurred = [i for i in ITEMS if i in small and not small[i]["correct"]]
    assert ours.detail_items == len(blurred)
    assert ours.detail == pytest.approx(sum(aim[i]["correct"] for i in blurred) / len(blurred))
    same = [aim[i]["prediction"].strip() == full[i]["prediction"].strip() for i in ITEMS]
    assert ours.agreement == sum(same) / n


def test_baselines_are_not_compared_with_themselves(runs_comparisons):
    every, _ = runs_comparisons
    one = comparisons(_find(every, "random", 0.5), every)
    assert one.random is None and one.downscale is not None
    other = comparisons(_find(every, "downscale", 0.5), every)
    assert other.downscale is None and other.detail == 0.0
    assert comparisons(_find(every, "random", 0.9), every).downscale is None


def test_a_baseline_with_options_of_a_method_is_a_method(tmp_path):
    """Seeds of random: 1 of 4 and 3 of 4, so ½; with merge=True 4 of 4, which would make it ⅔."""
    said = {"full": "1111", "random": "1000", "random-1": "1110", "random-m": "1111", "aim": "1100"}
    options = {"random-1": {"seed": 1}, "random-m": {"merge": True}}
    for name, marks in said.items():
        scores = dict(zip(("a1", "a2", "a3", "a4"), map(int, marks), strict=True))
        reducer, own = name.partition("-")[0], options.get(name, {})
        write_run(tmp_path / name, reducer, 0.5 * (name != "full"), scores, options=own)
    every = find_runs([tmp_path / name for name in said])
    aim = comparisons(_find(every, "aim", 0.5), every)
    assert (aim.seeds, aim.random.value) == (2, 0.0)
    (merging,) = (r for r in every if r.label == "random merge=True")
    assert comparisons(merging, every).random.value == 0.5
    assert [(loss.label, loss.rival) for loss in losses(every)] == []


def test_random_is_one_row_however_many_seeds_it_has(tmp_path):
    """Of seeds 2 and 10, items a1 to a4 are right 1 0 0 0 and 1 1 1 0; aim has 0 0 0 1.

    Against half of the seeds or more: one won, three lost. Random is one row, right in 2 of 4.
    """
    said = {"full": "1111", "random-10": "1110", "random-2": "1000", "aim": "0001"}
    for name, marks in said.items():
        scores = dict(zip(("a1", "a2", "a3", "a4"), map(int, marks), strict=True))
        reducer, _, seed = name.partition("-")
        options = {"seed": int(seed)} if seed else {}
        write_run(tmp_path / name, reducer, 0.5 * (name != "full"), scores, options=options)
    every = find_runs([tmp_path / name for name in said])
    test = paired_tests(_find(every, "aim", 0.5), every)["against_random"]
    assert (test.wins, test.losses, test.p) == (1, 3, 0.625)
    (loss,) = losses(every)
    assert (loss.accuracy, loss.rival_accuracy) == (0.25, 0.5)
    assert loss.gap.value == -0.25 and not loss.sure  # one won of four
    _, line, aim = find_lines(every)
    assert (line.label, line.accuracy, line.seeds) == ("random (2 seeds)", 0.5, (0.25, 0.75))
    assert (line.retention.value, aim.comparisons.random.value, aim.comparisons.seeds) == (
        0.5,
        -0.25,
        2,
    )
    assert [r["correct"] for r in line.run.answered] == [1, 0.5, 0.5, 0]


def test_losses_are_the_groups_that_score_lower(runs_comparisons):
    every, said = runs_comparisons
    found = {(loss.family, loss.rival) for loss in losses(every)}
    expected = set()
    for group, name in product("ab", ("random", "downscale")):
        tables = (
            [said[k, 0.5] for k in ("random", "random-1")]
            if name == "random"
            else [said[name, 0.5]]
        )
        ids = [i for i in ITEMS if i[0] == group and all(i in table for table in tables)]
        own = sum(said["aim", 0.5][i]["correct"] for i in ids)
        if own < sum(t[i]["correct"] for t in tables for i in ids) / len(tables):
            expected.add((group, name))
    assert found == expected and expected
    assert all(
        loss.label == "aim" and loss.accuracy < loss.rival_accuracy for loss in losses(every)
    )


def test_the_page_lists_what_lost_and_counts_what_chance_explains(tmp_path, capsys):
    """Of 12 questions: 12 lost in group a against random, one in group b."""
    right = {f"{group}{i}": 1 for group in "ab" for i in range(12)}
    lost = {**right, **{f"a{i}": 0 for i in range(12)}, "b0": 0}
    for name, ratio, scores in (("full", 0.0, right), ("random", 0.5, right), ("aim", 0.5, lost)):
        write_run(tmp_path / "r", name, ratio, scores)
    found = {loss.family: loss.sure for loss in losses(find_runs([tmp_path / "r"]))}
    assert found == {"a": True, "b": False}
    assert run("report", tmp_path / "r", "-o", tmp_path / "r.html") == 0
    part = (tmp_path / "r.html").read_text().split("Where it loses")[1].split("<h2>")[0]
    assert re.findall(r"<tr><td>aim</td><td>0.5</td><td>(.)</td>", part) == ["a"]
    assert "1 more comparison is lower" in part


def test_one_ratio_has_one_plot(runs, tmp_path, capsys):
    """Without a line over ratios, time per answer would repeat the rows of the first plot."""
    both = []
    for ratio in (0.5, 0.75):
        table = rows(runs)
        both.append(len(report.plots(table)))
        for name in ("random", "aim"):
            scores = {"a1": 0, "a2": 1, "a3": 0, "b1": 0, "b2": 0, "b3": 1}
            write_run(runs, name, ratio + 0.25, scores)
    assert both == [1, 2]


@pytest.mark.parametrize(
    ("name", "ratio", "layers", "first"),
    [
        ("fastv", 0.75, 6, 0),  # half of the budget would be gone before layer 2
        ("fastv", 0.75, 16, None),
        ("fastv", 0.5, 28, None),
        ("pyramiddrop", 0.75, 16, 1),  # three halvings save too little at any depth
        ("pyramiddrop", 0.5, 16, None),
        ("aim", 0.75, 16, None),
        ("condiv", 0.9, 6, None),
    ],
)
def test_moved_methods_say_so(name, ratio, layers, first):
    note = make_reducer(name).deviation(ratio, layers)
    assert (note == "") is (first is None), note
    if first is not None:
        assert note.startswith(f"cuts before layer {first}")


def test_pictures_of_images_and_videos_are_drawn_and_reported(loaded, examples, tmp_path, capsys):
    """Untrained models answer all alike, so the scores are written by hand."""
    setting = Setting("uniform", 0.75)
    runs = sweep(*loaded, examples, [Setting(), setting], tmp_path, max_new_tokens=2)
    for one in runs.values():
        for record in one.records:
            record["correct"] = one.setting.off
    folder = runs[setting].path
    by_id = {e.id: e for e in examples}
    shown = draw_lost(*loaded, runs[setting], runs[Setting()], by_id, folder, per_kind=2)
    write_lost(folder, shown)
    expected = sorted(e.id for e in examples if e.media[0].suffix != ".mp4")[:2]
    expected += sorted(e.id for e in examples if e.media[0].suffix == ".mp4")
    assert [item.id for item in shown] == expected and read_lost(folder) == shown
    sizes = [Image.open(folder / item.picture).size for item in shown]
    assert sizes[0] == (224, 224) and sizes[2][0] > 2 * sizes[2][1] * 0.9  # a sheet of frames
    for one in runs.values():
        lines = [json.dumps(r) + "\n" for r in one.records]
        (one.path / "records.jsonl").write_text("".join(lines))
    page = tmp_path / "r.html"
    assert run("report", tmp_path, "-o", page) == 0
    assert page.read_text().count('<figure><label class="zoom"') == len(shown)
