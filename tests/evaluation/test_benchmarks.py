"""lmms-eval's tasks on local data. The end-to-end part runs where lmms-eval is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.console import run

from tokencomp.errors import OptionError
from tokencomp.lmms import data as bench_data
from tokencomp.lmms.data import SHAPESQA_ID, LocalData, write_shapesqa
from tokencomp.lmms.tasks import item_score

LMMS = importlib.util.find_spec("lmms_eval") is not None
needs_lmms = pytest.mark.skipif(not LMMS, reason="needs the extra [eval]")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapesqa(tmp_path_factory.mktemp("cache"), 1)


def test_videos_are_found_where_lmms_eval_looks(data, tmp_path):
    local = LocalData(data)
    links = {"mlvu": "sy1998/MLVU_dev", "mvbench_video": "OpenGVLab/MVBench"}
    local.stage(tmp_path / "home", links)
    row = json.loads((data / "sy1998/MLVU_dev/test.jsonl").read_text().splitlines()[0])
    assert (tmp_path / "home/mlvu" / row["video_name"]).exists()
    clip = json.loads((data / "OpenGVLab/MVBench/json/action_count.json").read_text())[0]["video"]
    assert (tmp_path / "home/mvbench_video/perception/videos" / clip).exists()


@pytest.mark.parametrize(
    "sample, score",
    [
        ({"doc_id": 0, "mvbench_accuracy": {"pred_answer": "A", "score": 1}}, 1.0),
        ({"mlvu_percetion_score": {"pred_answer": "B", "answer": "B"}}, 1.0),
        ({"mlvu_percetion_score": {"pred_answer": "B", "answer": "C"}}, 0.0),
        ({"doc_id": 3, "exact_match": 0.5}, 0.5),
    ],
)
def test_scores_per_item(sample, score):
    assert item_score(sample) == score
    with pytest.raises(OptionError, match="no score per item"):
        item_score({"doc_id": 0, "doc": {"answer": 1}, "judged": "fine"})


def test_copies_of_a_data_set_are_told_apart(data, tmp_path):
    """Answers about one copy never count for another."""
    known = {LocalData(data).label("a/b"), LocalData(tmp_path).label("a/b")}
    assert len(known) == 2 and not any(str(data.parent) in name for name in known)


def launch(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: lmms-eval reads HF_HOME once, at import."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True, text=True, check=False, env={**os.environ, **env},
    )  # fmt: skip


def tokencomp(*args: object) -> subprocess.CompletedProcess[str]:
    return launch("tokencomp", "eval", *args)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def answers(folder: Path) -> dict[str, tuple]:
    """What a run says, without what may differ between two runs of the same thing."""
    rows = records(folder)
    assert len({r["id"] for r in rows}) == len(rows), "an item counts once"
    return {r["id"]: (r.get("prediction"), r.get("correct"), bool(r.get("error"))) for r in rows}


def damage(data: Path) -> None:
    next(iter(sorted((data / "sy1998/MLVU_dev/video/order").glob("*.mp4")))).write_bytes(b"damaged")


@pytest.fixture(scope="module")
def args(folder, data) -> tuple[object, ...]:
    """One setting, three tasks, a damaged video."""
    damage(data)
    tasks = "shapesqa,mlvu_dev,mvbench_action_count"
    return (
        "--model", folder, "--data", data, "--tasks", tasks, "--ratio", "0.75", "-r", "uniform",
        "--no-baselines", "--batch-size", "4",
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(args, tmp_path_factory) -> Path:
    """The run folder of one process."""
    out = tmp_path_factory.mktemp("runs")
    first = tokencomp(*args, "-o", out)
    assert first.returncode == 0, first.stderr[-2000:]
    return out


@needs_lmms
@pytest.mark.slow
def test_eval_runs_lmms_evals_tasks(done, data, tmp_path):
    rows = records(done / "uniform-0.75")
    assert len(rows) == 9 + 3 + 1
    failed = [r for r in rows if r.get("error")]
    assert len(failed) == 1 and "no frame of this video" in failed[0]["error"]
    manifest = json.loads((done / "uniform-0.75/manifest.json").read_text())
    assert manifest["summary"]["failed"] == 1 and manifest["finished"] is True
    assert set(manifest["scores"]) >= {"shapesqa", "mlvu_dev", "mvbench_action_count"}
    # what a human would read off is what lmms-eval scored
    wanted = {r["question"]: r["answer"].lower() for r in lines(data / SHAPESQA_ID)}
    for row in (r for r in rows if not r.get("error")):
        if row["id"].startswith("shapesqa/"):
            assert row["correct"] == float(row["prediction"].lower() == wanted[row["prompt"]])
        else:
            said = re.match(r"\W*([A-D])\b", row["prediction"])
            assert row["correct"] == float(bool(said) and said.group(1) == row["answer"])
    assert run("report", done, "-o", tmp_path / "r.html") == 0


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


@needs_lmms
@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
def test_eval_goes_on_after_a_kill(args, done, tmp_path, finished):
    """Half of the answers are there, the last line is cut, and nothing has been scored.

    A finished run with a failed question goes on as well.
    """
    out = tmp_path / "runs"
    shutil.copytree(done, out)
    cut = out / "uniform-0.75"
    content = json.loads((cut / "manifest.json").read_text())
    if not finished:
        (cut / "records.jsonl").unlink()
        (cut / "manifest.json").write_text(json.dumps({"identity": content["identity"]}))
    file = next(cut.glob("answers-16/records.jsonl"))
    before = file.read_text().splitlines(keepends=True)
    file.write_text("".join(before[:2]) + before[2][:20])
    again = tokencomp(*args, "-o", out)
    assert again.returncode == 0, again.stderr[-2000:]
    assert file.read_text().startswith("".join(before[:2]))
    assert answered(out, "records.jsonl") == answered(done, "records.jsonl")
    assert answers(cut) == answers(done / "uniform-0.75")


def answered(out: Path, name: str) -> set[str]:
    files = out.glob(f"uniform-0.75/answers-*/{name}")
    return {json.loads(line)["id"] for file in files for line in file.read_text().splitlines()}


@needs_lmms
@pytest.mark.slow
def test_lmms_evals_own_command_gives_the_same_score(folder, done, data, tmp_path):
    """`lmms-eval --model tokencomp` on the one-word task, whose data are found in HF_HOME."""
    LocalData(data).stage(tmp_path / "home", {"shapesqa": SHAPESQA_ID})
    local = tmp_path / "tasks"
    local.mkdir()
    own = Path(bench_data.__file__).parent
    (local / "shapesqa_task.py").write_text((own / "shapesqa_task.py").read_text())
    task = (own / "shapesqa.yaml").read_text().replace(SHAPESQA_ID, str(data / SHAPESQA_ID))
    (local / "shapesqa.yaml").write_text(task.replace("  cache_dir: shapesqa", "  {}"))
    model = f"pretrained={folder},reducer=uniform,ratio=0.75"
    finished = launch(
        "lmms_eval", "--model", "tokencomp", "--model_args", model, "--tasks", "shapesqa",
        "--include_path", local, "--batch_size", 4, "--output_path", tmp_path / "out",
        HF_HOME=str(tmp_path / "home"), HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-2000:]
    content = json.loads(next((tmp_path / "out").rglob("*results.json")).read_text())["results"]
    known = json.loads((done / "uniform-0.75/manifest.json").read_text())["scores"]
    assert content["shapesqa"]["exact_match,none"] == known["shapesqa"]["exact_match"]


@needs_lmms
def test_the_entry_point_is_found_by_lmms_eval():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("tokencomp").__name__ == "TokenComp"
