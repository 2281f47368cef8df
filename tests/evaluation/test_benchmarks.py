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

from benchmarks.gpu.catalogue import TABLES
from tokencomp.errors import MediaError, OptionError
from tokencomp.lmms import data as bench_data
from tokencomp.lmms.data import SHAPESQA_ID, LocalData, local_data, write_shapesqa
from tokencomp.lmms.tasks import item_score

LMMS = importlib.util.find_spec("lmms_eval") is not None
needs_lmms = pytest.mark.skipif(not LMMS, reason="needs the extra [eval]")
MLVU = {"dataset_path": "sy1998/MLVU_dev", "dataset_kwargs": {"cache_dir": "mlvu"}}


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


def test_missing_data_say_what_to_put_where(tmp_path):
    with pytest.raises(OptionError, match="no such folder"):
        local_data(str(tmp_path / "nowhere"))
    content = str(LocalData(tmp_path).missing("mlvu_dev", MLVU))
    assert (
        str(tmp_path / "sy1998/MLVU_dev") in content
        and "`hf download --repo-type dataset" in content
    )


NIAH = "mmlb_data_example/NIAH/counting-image_test_K128_dep3.jsonl"
MMLONGBENCH = {
    "dataset_path": "json",
    "dataset_kwargs": {
        "data_files": f"https://huggingface.co/datasets/ZhaoweiWang/MMLongBench/resolve/main/{NIAH}"
    },
    "test_split": "train",
}


def write_mmlongbench(root: Path) -> None:
    """A needle counted in a text with pictures, as the data set's own file has it."""
    from PIL import Image

    folder = root / "ZhaoweiWang/MMLongBench"
    (folder / NIAH).parent.mkdir(parents=True)
    names = [f"mm-niah/{name}.png" for name in ("first", "second", "needle")]
    for colour, name in zip(("red", "blue", "green"), names, strict=True):
        path = folder / "mmlb_image" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (56, 56), colour).save(path)
    texts = ["A fox.", "<image>", "A crow.", "<image>", "The end."]
    kinds = ["image" if text == "<image>" else "text" for text in texts]
    doc = {
        "id": "counting-image-0",
        "ctxs": [{"type": k, "text": t} for k, t in zip(kinds, texts, strict=True)],
        "question": "How often does <image> appear in each picture? Give a list.",
        "answer": [0, 1],
        "image_list": names[:2],
        "needle_image_list": names[2:],
    }
    lines = [json.dumps(doc), json.dumps({**doc, "id": "counting-image-1", "answer": [2, 0]})]
    (folder / NIAH).write_text("\n".join(lines) + "\n")


def test_a_task_that_names_a_file_on_the_hub_finds_it_in_the_copy(tmp_path, monkeypatch):
    """MMLongBench: `dataset_path: json`, and images below a folder that a variable names.

    The task would ask its questions without the images that it does not find.
    """
    monkeypatch.setenv("MMLONGBENCH_IMAGE_ROOT", "/elsewhere")
    local = LocalData(tmp_path)
    assert not local.has(MMLONGBENCH)
    write_mmlongbench(tmp_path)
    assert local.has(MMLONGBENCH)
    local.stage(tmp_path / "home", {})
    images = tmp_path / "ZhaoweiWang/MMLongBench/mmlb_image"
    assert Path(os.environ["MMLONGBENCH_IMAGE_ROOT"]) == images
    changes = local.changes(MMLONGBENCH)["dataset_kwargs"]["data_files"]
    assert changes["train"] == str(images.parent / NIAH)
    local.check_images("mmlongbench", MMLONGBENCH)
    (images / "mm-niah/second.png").unlink()
    with pytest.raises(MediaError, match=r"1 of 3 images .* the first is mm-niah/second\.png"):
        local.check_images("mmlongbench", MMLONGBENCH)
    shutil.rmtree(images)
    assert not local.has(MMLONGBENCH)


@needs_lmms
@pytest.mark.slow
def test_mmlongbench_from_a_local_copy(folder, tmp_path):
    """lmms-eval's own prompts and scoring; every picture counts, at its place in the text."""
    write_mmlongbench(tmp_path / "copy")
    done = tokencomp(
        "--model", folder, "--data", tmp_path / "copy", "--tasks", "mmlongbench", "-r", "uniform",
        "--ratio", "0.5", "--no-baselines", "-o", tmp_path / "o",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = records(tmp_path / "o/uniform-0.5")
    assert [r["id"] for r in rows] == ["mmlongbench/0", "mmlongbench/1"]
    for row, gold in zip(rows, (1, 2), strict=True):
        assert row["visual_tokens"] == 3 * 4 and row["ratio"] == 0.5
        numbers = [int(n) for n in re.findall(r"-?\d+", row["prediction"])]
        assert row["correct"] == float(sum(numbers) == gold)
        assert row["prompt"].count("<image>") == 3
    manifest = json.loads((tmp_path / "o/uniform-0.5/manifest.json").read_text())
    assert manifest["identity"]["data"] == ["copy/ZhaoweiWang/MMLongBench"]
    assert set(manifest["scores"]) == {"mmlongbench"}


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
@pytest.mark.long
@pytest.mark.parametrize("name", TABLES)
def test_every_gpu_table_has_a_trial(name, tmp_path):
    """The command of a published table takes all its steps on the embedded model."""
    done = launch("benchmarks.gpu.tables", name, "--dry-run", "--runs", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the trial took every step" in done.stdout
    folder = tmp_path / "dry-run" / name
    steps = len(TABLES[name].steps)
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{n}" for n in range(steps)]
    assert all((folder / f"step-{n}/full/records.jsonl").exists() for n in range(steps))


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


@needs_lmms
@pytest.mark.slow
def test_two_processes_share_the_work(args, done, tmp_path):
    """lmms-eval gives the shorter share a copy of its last item; it must not count twice.

    torchrun sets what `accelerate launch` sets on GPUs; with `--cpu` accelerate starts one process
    only.
    """
    out = tmp_path / "runs"
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    both = launch(*launcher, "-m", "tokencomp", "eval", *args, "-o", out)
    assert both.returncode == 0, both.stderr[-2000:]
    assert answers(out / "uniform-0.75") == answers(done / "uniform-0.75")
    parts = [answered(out, name) for name in ("records.jsonl", "records.1.jsonl")]
    assert parts[0] - parts[1] and parts[1] - parts[0], "each answered items of its own"
    assert both.stdout.count("Run folders") == 1, "one process speaks"


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
