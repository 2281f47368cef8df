"""lmms-eval's tasks on local data. The end-to-end part runs where lmms-eval is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import run

from tokencomp.errors import OptionError
from tokencomp.evaluation.bench_data import LocalData, local_data, write_shapesqa
from tokencomp.evaluation.benchmarks import item_score

LMMS = importlib.util.find_spec("lmms_eval") is not None
needs_lmms = pytest.mark.skipif(not LMMS, reason="needs the extra [eval]")
MLVU = {"dataset_path": "sy1998/MLVU_dev", "dataset_kwargs": {"cache_dir": "mlvu"}}
MVBENCH = {"dataset_path": "OpenGVLab/MVBench", "dataset_name": "action_count"}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapesqa(tmp_path_factory.mktemp("cache"), 1)


def test_shapesqa_has_the_layout_of_the_hub(data):
    local = LocalData(data)
    assert local.has(MLVU) and local.has(MVBENCH)
    assert not local.has({**MVBENCH, "dataset_name": "egocentric_navigation"})
    rows = (data / "sy1998/MLVU_dev/test.jsonl").read_text().splitlines()
    assert all((data / "sy1998/MLVU_dev" / json.loads(r)["video_name"]).exists() for r in rows)


def test_videos_are_found_where_lmms_eval_looks(data, tmp_path):
    local = LocalData(data)
    links = {"mlvu": "sy1998/MLVU_dev", "mvbench_video": "OpenGVLab/MVBench"}
    local.stage(tmp_path / "home", links)
    row = json.loads((data / "sy1998/MLVU_dev/test.jsonl").read_text().splitlines()[0])
    assert (tmp_path / "home/mlvu" / row["video_name"]).exists()
    clip = json.loads((data / "OpenGVLab/MVBench/json/action_count.json").read_text())[0]["video"]
    assert (tmp_path / "home/mvbench_video/perception/videos" / clip).exists()


def test_missing_data_say_what_to_put_where(tmp_path):
    with pytest.raises(OptionError, match="no such folder"):
        local_data(str(tmp_path / "nowhere"))
    told = str(LocalData(tmp_path).missing("mlvu_dev", MLVU))
    assert str(tmp_path / "sy1998/MLVU_dev") in told and "huggingface-cli" in told


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


def test_a_task_without_item_scores_is_refused():
    with pytest.raises(OptionError, match="no score per item"):
        item_score({"doc_id": 0, "doc": {"answer": 1}, "judged": "fine"})


def tokencomp(*args: object) -> subprocess.CompletedProcess[str]:
    """A process of its own: lmms-eval reads HF_HOME once, at import."""
    command = [sys.executable, "-m", "tokencomp.cli", "eval", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_lmms
@pytest.mark.slow
def test_eval_runs_lmms_evals_tasks_and_goes_on_after_a_kill(folder, data, tmp_path):
    video = data / "sy1998/MLVU_dev" / "video/order"
    broken = sorted(video.glob("*.mp4"))[0]
    broken.write_bytes(b"damaged")
    args = (
        "--model", folder, "--data", data, "--tasks", "mlvu_dev,mvbench_action_count",
        "--ratio", "0.75", "-r", "uniform", "--no-baselines", "-o", tmp_path / "runs",
    )  # fmt: skip
    first = tokencomp(*args)
    assert first.returncode == 0, first.stderr[-2000:]
    records = (tmp_path / "runs/uniform-0.75/records.jsonl").read_text().splitlines()
    rows = {r["id"]: r for r in map(json.loads, records)}
    assert len(rows) == 4
    failed = [r for r in rows.values() if r.get("error")]
    assert len(failed) == 1 and "no frame of this video" in failed[0]["error"]
    manifest = json.loads((tmp_path / "runs/uniform-0.75/manifest.json").read_text())
    assert manifest["summary"]["failed"] == 1 and manifest["scores"]["mlvu_dev"]
    # the letter a human would read off is what lmms-eval scored
    for row in rows.values():
        if not row.get("error") and row["family"] in ("needle", "count"):
            said = re.match(r"\W*([A-D])\b", row["prediction"])
            assert row["correct"] == float(bool(said) and said.group(1) == row["answer"])
    (tmp_path / "runs/uniform-0.75/manifest.json").unlink()
    (tmp_path / "runs/uniform-0.75/records.jsonl").unlink()
    answers = next((tmp_path / "runs/uniform-0.75").glob("answers-*/records.jsonl"))
    before = answers.read_text().splitlines()
    assert tokencomp(*args).returncode == 0
    again = (tmp_path / "runs/uniform-0.75/records.jsonl").read_text().splitlines()
    assert again == records
    assert answers.read_text().splitlines()[: len(before)] == before
    assert run("report", tmp_path / "runs", "-o", tmp_path / "r.html") == 0


@needs_lmms
def test_unknown_task_names_close_matches(folder, data):
    done = tokencomp("--model", folder, "--data", data, "--tasks", "mlvu_dve")
    assert done.returncode == 2 and "mlvu_dev" in done.stderr and "Traceback" not in done.stderr


@needs_lmms
def test_the_entry_point_is_found_by_lmms_eval():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("tokencomp").__name__ == "TokenComp"
