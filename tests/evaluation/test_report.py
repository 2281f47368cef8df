"""The report's table against statistics computed from the raw record files."""

from __future__ import annotations

import csv
import json
import re
import resource
import shutil
from pathlib import Path

import pytest
from PIL import Image
from support.console import run

from tokencomp.errors import OptionError
from tokencomp.evaluation import Example, evaluate, grid, mcnemar, retention, sweep
from tokencomp.pages.pictures import save_kept, save_picture
from tokencomp.pages.plots import Point, lines

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


def test_table_is_paired_by_item(runs, tmp_path, capsys):
    page = tmp_path / "r.html"
    assert run("report", runs, "-o", page, "--json") == 0
    full, random, aim = json.loads(capsys.readouterr().out)
    assert (full["accuracy"], random["accuracy"], aim["accuracy"]) == (5 / 6, 2 / 6, 5 / 6)
    order = [1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]
    expected = retention(*order)
    assert aim["retention"]["value"] == expected.value == 1.0
    found = mcnemar([1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 0, 1])
    assert aim["against_random"] == {"wins": 3, "losses": 0, "p": found.p} and found.p == 0.25
    assert aim["families"] == {"a": 2 / 3, "b": 1.0}
    assert aim["failed"] == 1 and aim["flops"] == 0.5


def test_page_is_one_file_and_says_what_failed(runs, tmp_path):
    page = tmp_path / "r.html"
    assert run("report", runs / "full-0.0", runs / "aim-0.5", "-o", page) == 0
    content = page.read_text()
    assert content.count("<svg") == 2 and not re.search(r'(src|href)="(?!data:|#)', content)
    assert "no frame of this video" in content and "+1 failed" in content
    assert 'name="viewport"' in content


def test_the_table_is_a_file_for_programs_and_papers(runs, tmp_path, capsys):
    page, files = tmp_path / "r.html", (tmp_path / "t.csv", tmp_path / "t.tex")
    assert run("report", runs, "-o", page, "--table", files[0], "--table", files[1]) == 0
    with files[0].open() as file:
        full, random, aim = csv.DictReader(file)
    assert [float(row["accuracy"]) for row in (full, random, aim)] == [5 / 6, 2 / 6, 5 / 6]
    assert (full["retention"], aim["failed"], float(random["retention"])) == ("", "1", 2 / 5)
    assert float(aim["against_random"]) == pytest.approx(3 / 6)
    low, high = float(aim["retention_low"]), float(aim["retention_high"])
    assert low < 1 < high
    tabular = files[1].read_text().splitlines()
    assert tabular[0] == r"\begin{tabular}{lrrrrr}" and tabular[-1] == r"\end{tabular}"
    assert tabular[6].startswith(rf"aim & 0.5 & 83.3\% & 100.0\% [{100 * low:.1f}\%, ")
    assert {line.count(" & ") for line in tabular if line.endswith(r"\\")} == {5}
    assert run("report", runs, "-o", page, "--table", tmp_path / "t.xls") == 2
    assert ".csv or .tex" in capsys.readouterr().err


def strict(text: str) -> object:
    """Read JSON as other programs do, which know no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_has_no_value_is_null_in_json_and_a_dash_in_tables(tmp_path, capsys):
    """The full model answers nothing right, so that no share of it can be kept."""
    root, page, file = tmp_path / "r", tmp_path / "p.html", tmp_path / "t.tex"
    write_run(root, "full", 0.0, {"a1": 0, "a2": 0})
    write_run(root, "aim", 0.5, {"a1": 1, "a2": 0})
    assert run("report", root, "-o", page, "--json", "--table", file) == 0
    full, aim = strict(capsys.readouterr().out)
    assert aim["retention"] == {"value": None, "low": None, "high": None, "items": 2}
    assert (aim["accuracy"], full["accuracy"]) == (0.5, 0.0)
    assert r"aim & 0.5 & 50.0\% & -- & -- & 50\% \\" in file.read_text().splitlines()
    assert not re.search(r"\bnan\b", re.sub("<svg.*?</svg>", "", page.read_text(), flags=re.S))


def test_the_manifest_of_a_run_without_answers_is_json(loaded, tmp_path):
    gone = [Example("0", "?", "x", (tmp_path / "gone.png",))]
    evaluate(*loaded, gone, out_dir=tmp_path / "o", progress=False)
    summary = strict((tmp_path / "o/manifest.json").read_text())["summary"]
    means = ("accuracy", "achieved_ratio", "flops", "kv_bytes")
    assert summary == {"items": 0, "failed": 1, **dict.fromkeys(means)}


def test_a_table_that_cannot_be_written_leaves_the_page(runs, tmp_path, capsys):
    page, file = tmp_path / "r.html", tmp_path / "file"
    file.touch()
    assert run("report", runs, "-o", page, "--table", file / "t.csv") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert err.startswith("error: cannot write") and err.endswith("Give another --table.")
    assert page.exists()


def test_items_that_all_agree_have_an_interval_with_a_width(tmp_path, capsys):
    """Two items that both get right: with 1 - 0.025 ** (1 / 2) of other items, none may show."""
    page, files = tmp_path / "p.html", (tmp_path / "t.csv", tmp_path / "t.tex")
    for name, ratio in (("full", 0.0), ("aim", 0.5)):
        write_run(tmp_path / "r", name, ratio, {"a1": 1, "a2": 1})
    given = (tmp_path / "r", "-o", page, "--table", files[0], "--table", files[1])
    _, aim = shown(capsys, *given)
    assert aim["retention"]["low"] == pytest.approx(0.158, abs=1e-3)
    assert aim["comparisons"]["full"]["high"] == pytest.approx(0.842, abs=1e-3)
    content = " ".join(page.read_text().split())
    assert "<td>100.0 %</td><td>16–100</td>" in content
    assert "+0.0 <small>-84…+84</small>" in content
    with files[0].open() as file:
        _, row = csv.DictReader(file)
    assert float(row["retention_low"]) == pytest.approx(0.158, abs=1e-3)
    assert r"100.0\% [15.8\%, 100.0\%]" in files[1].read_text()
    assert run("report", tmp_path / "r", "-o", page) == 0
    assert "100.0% [16%, 100%]" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["mixed", "no full", "nothing", "unfinished"])
def test_what_cannot_be_reported(runs, tmp_path, capsys, case):
    given = [runs]
    if case == "mixed":
        write_run(runs, "prune", 0.5, {"a1": 1}, frames=16)
        message = "differ in frames: 8 and 16"
    elif case == "no full":
        given, message = [runs / "aim-0.5"], "full model is missing"
    elif case == "nothing":
        (tmp_path / "empty").mkdir()
        given, message = [tmp_path / "empty"], "no run folder"
    else:
        path = runs / "aim-0.5" / "manifest.json"
        path.write_text(path.read_text().replace('"finished": true', '"finished": false'))
        message = "goes on where it stopped"
    assert run("report", *given, "-o", tmp_path / "x.html") == 2
    assert message in " ".join(capsys.readouterr().err.split())


def shown(capsys, *args) -> list[dict]:
    assert run("report", *args, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_rows_and_shares_are_of_the_same_items(tmp_path, capsys):
    """The full model works 100 on a1, 300 on a2, 500 on a3; aim 30 on a1 and 90 on a2.

    Shares are 120 of 400 and not 60 of 300. Where a2 fails under aim, 30 of 100 are left.
    """

    def put(name, ratio, scores, flops, failed=()):
        folder = write_run(tmp_path / "r", name, ratio, scores)
        rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        costs = [{**row, "flops": n} for row, n in zip(rows, flops, strict=False)]
        costs = [{"id": r["id"], "error": "big"} if r["id"] in failed else r for r in costs]
        lines = [json.dumps(row) + "\n" for row in [*costs, rows[-1]]]
        (folder / "records.jsonl").write_text("".join(lines))
        return folder

    page = tmp_path / "p.html"
    whole = put("full", 0.0, {"a1": 1, "a2": 1, "a3": 0}, [100, 300, 500])
    part = put("aim", 0.5, {"a1": 1, "a2": 0}, [30, 90])
    full, aim = shown(capsys, whole, part, "-o", page)
    assert (full["items"], full["accuracy"], full["left_out"], aim["left_out"]) == (2, 1.0, 1, 0)
    assert (aim["flops"], aim["kv_bytes"], aim["accuracy"]) == (0.3, 1.0, 0.5)
    assert "Left out are items that not all runs have, up to 1 of one run" in page.read_text()
    assert "but for those that failed" not in page.read_text()
    assert run("report", whole, part, "-o", page) == 0
    assert "up to 1 of one run" in capsys.readouterr().out
    gone = put("prune", 0.5, {"a1": 1, "a2": 0}, [30, 90], failed=("a2",))
    *_, prune = shown(capsys, whole, gone, "-o", page)
    assert (prune["flops"], prune["items"], prune["failed"]) == (0.3, 1, 2)
    assert "but for those that failed under it" in page.read_text()


def test_runs_without_a_common_item_are_refused(runs, tmp_path, capsys):
    folder = write_run(tmp_path / "x", "prune", 0.5, {"c1": 1})
    file = folder / "records.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert run("report", runs, folder, "-o", tmp_path / "x.html") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "no item is in all runs" in message and "prune-0.5 has 1" in message


def test_one_folder_by_two_names_is_one_run(runs, tmp_path, capsys, monkeypatch):
    page = tmp_path / "r.html"
    (tmp_path / "link").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    once = shown(capsys, runs, "-o", page)
    assert shown(capsys, "runs", runs, tmp_path / "link", "runs/aim-0.5", "-o", page) == once
    assert [row["comparisons"]["seeds"] for row in once] == [0, 0, 1]


def test_runs_of_one_setting_give_their_items_to_one_row(runs, tmp_path, capsys):
    """Six answered items and b4: of the full model 5 + 1 of 7 are right, of aim 5 + 0."""
    other, page = tmp_path / "other", tmp_path / "r.html"
    write_run(other, "full", 0.0, {"b3": 1, "b4": 1})
    write_run(other, "aim", 0.5, {"b4": 0})
    given = runs / "full-0.0", runs / "aim-0.5", other
    full, aim = shown(capsys, *given, "-o", page)
    assert (full["items"], aim["items"], full["failed"]) == (7, 7, 1)
    assert (full["accuracy"], aim["accuracy"]) == (6 / 7, 5 / 7)
    write_run(tmp_path / "wrong", "aim", 0.5, {"a1": 0})
    assert run("report", *given, tmp_path / "wrong", "-o", page) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "runs of one setting whose answers to question 'a1' differ" in message
    write_run(tmp_path / "old", "aim", 0.5, {"a1": 1}, method="another rule")
    assert run("report", *given, tmp_path / "old", "-o", page) == 2
    assert "stood for None and for 'another rule'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("field", "words"),
    [("media", "pictures, clips or sounds"), ("prompt", "words"), ("answer", "right answer")],
)
def test_answers_to_different_questions_are_not_paired(runs, tmp_path, capsys, field, words):
    """The picture of a2 was replaced, say, before the second run."""
    for name, value in (("full-0.0", "old"), ("aim-0.5", "new")):
        file = runs / name / "records.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [{**row, field: value if row["id"] == "a2" else "same"} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = runs / "full-0.0", runs / "aim-0.5"
    assert run("report", *given, "-o", tmp_path / "x.html") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"differ in the {words} of question 'a2'" in message and "eval` again" in message


def damaged(folder: Path, case: str) -> str:
    """Damage a run folder; returns what the report must say."""
    records, manifest = folder / "records.jsonl", folder / "manifest.json"
    content = json.loads(manifest.read_text())
    if case == "no id":
        records.write_text('{"correct": true}\n')
        return "line 1: not a record"
    if case == "no score":
        records.write_text('{"id": "a1", "prediction": ""}\n')
        return "lacks family or correct"
    if case == "no text":
        records.write_bytes(bytes(range(256)))
        return "not a readable records file"
    if case == "fewer":
        manifest.write_text(json.dumps({**content, "summary": {"items": 9, "failed": 1}}))
        return "records of 7 items, and its manifest says 10"
    if case == "no identity":
        del content["identity"]
    else:
        content = [content]
    manifest.write_text(json.dumps(content))
    return "reducer, ratio, options" if case == "no identity" else "a JSON object"


@pytest.mark.parametrize(
    "case", ["no id", "no score", "no text", "fewer", "no identity", "list for manifest"]
)
def test_damaged_folders_are_refused(runs, tmp_path, capsys, case):
    message = damaged(runs / "aim-0.5", case)
    assert run("report", runs, "-o", tmp_path / "x.html") == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_plots_are_the_same_every_time():
    points = {"aim": [Point(0.5, 0.9, 0.8, 1.0), Point(0.9, 0.7, 0.6, 0.8)]}
    first, second = (lines(points, x="ratio", y="kept") for _ in range(2))
    assert first == second


def test_report_of_real_runs_shows_kept_patches(loaded, examples, tmp_path):
    settings = grid(["random", "aim"], [0.75])
    how = {"max_new_tokens": 2, "progress": False, "draw": save_kept}
    sweep(*loaded, examples[:2], settings, tmp_path, **how)
    page = tmp_path / "r.html"
    assert run("report", tmp_path, "-o", page) == 0
    assert page.read_text().count("data:image/jpeg;base64,") == 2
    damaged = next(tmp_path.rglob("aim*/kept.jpg"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    assert run("report", tmp_path, "-o", page) == 0
    assert page.read_text().count("data:image/jpeg;base64,") == 1
    assert "kept.jpg is missing or damaged" in page.read_text()
    shutil.rmtree(tmp_path / "random-0.75")
    (damaged.parent / "records.jsonl").unlink()
    sweep(*loaded, examples[:2], settings, tmp_path, **how)
    assert damaged.read_bytes() == whole


def test_pictures_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "kept.jpg"
    save_picture(Image.new("RGB", (8, 8), "red"), path)
    before = path.read_bytes()

    noise = Image.effect_noise((64, 64), 90)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OptionError, match=r"File too large.*make room"):
            save_picture(noise, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_scores_of_lmms_eval_stand_beside_each_other(runs, tmp_path, capsys):
    for name, scores in (("full-0.0", {"mlvu": {"accuracy": 0.75}}), ("random-0.5", {"mlvu": {}})):
        file = runs / name / "manifest.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "scores": scores}))
    page = tmp_path / "r.html"
    assert run("report", runs, "-o", page) == 0
    printed = capsys.readouterr().out.partition("lmms-eval's scores")[2]
    text = " ".join(re.sub("<[^>]+>", " ", page.read_text()).split())
    for shown in (printed, text):
        assert re.search(r"mlvu · accuracy\s+0\.75\s+–\s+–", shown)


@pytest.mark.parametrize(
    ("ratio", "shown"), [(0.5, "0.5"), ({"image": 0.5}, "image=0.5"), ("budget=16", "budget=16")]
)
def test_times_of_the_parts_are_shown_beside_the_full_models(runs, tmp_path, ratio, shown):
    """A linear layer of the page: every part of the setting with that of the full model."""
    file = runs / "aim-0.5/manifest.json"
    times = {"setting": {"vision": 0.012, "reduce": 0.001}, "full": {"vision": 0.0125, "reduce": 0}}
    manifest = json.loads(file.read_text())
    manifest["identity"]["ratio"] = ratio
    file.write_text(json.dumps({**manifest, "times": times}))
    page = tmp_path / "r.html"
    assert run("report", runs, "-o", page) == 0
    text = " ".join(re.sub("<[^>]+>", " ", page.read_text()).split())
    assert "Where the time goes" in text and f"aim {shown} 12.0 of 12.5 1.0 of 0.0" in text


def test_one_ratio_gives_a_row_per_method_and_no_column_of_points():
    one = {"random": [Point(0.75, 0.7, 0.4, 1.0)], "auto": [Point(0.74, 1.0, 1.0, 1.0)]}
    rows = lines(one, x="achieved ratio", y="accuracy", reference=0.9)
    assert all(f">{word}</text>" in rows for word in ("random", "auto", "accuracy", "full model"))
    assert rows.index(">random</text>") < rows.index(">auto</text>")
    assert "achieved ratio" not in rows
    two = lines({**one, "auto": [*one["auto"], Point(0.9, 0.8)]}, x="achieved ratio", y="accuracy")
    assert "achieved ratio" in two
