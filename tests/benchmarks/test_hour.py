"""What is measured on a GPU: parts, result files and their tables, on a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import hour, recompute
from benchmarks.gpu.contribution import ServingFile, collect, percentile, read, table_lines
from benchmarks.gpu.hour import MANIFEST, Part
from tokencomp.evaluation.metrics import difference

COMMANDS = {
    "good": "print('fine')",
    "bad": "raise SystemExit('broken')",
    "slow": "import time; time.sleep(60)",
}


def script(name: str, minutes: float = 1.0) -> Part:
    command = (sys.executable, "-c", COMMANDS[name])
    return Part(name, f"{name}?", minutes, command, command, False)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    """One part that ends well, one that fails, one that takes too long."""
    chosen = {"good": script("good"), "bad": script("bad"), "slow": script("slow", 0.01)}
    monkeypatch.setattr(hour, "parts", lambda model, folder: tuple(chosen.values()))
    return chosen


def statuses(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / MANIFEST).read_text())
    return {part["name"]: part["status"] for part in manifest["parts"]}


def test_every_end_is_noted_and_only_what_is_missing_runs_again(
    three: dict[str, Part], tmp_path: Path
) -> None:
    arguments = ["--rehearse", "--out", str(tmp_path)]
    assert hour.main(arguments) == 1
    assert statuses(tmp_path) == {"good": "done", "bad": "failed", "slow": "out of time"}
    good = script("good").command
    three.update({name: Part(name, "?", 1, good, good) for name in ("bad", "slow")})
    (tmp_path / "good/log.txt").write_text("as it was")
    assert hour.main(arguments) == 0
    assert (tmp_path / "good/log.txt").read_text() == "as it was"
    assert set(statuses(tmp_path).values()) == {"done"}


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="needs the extra [eval]")
def test_the_rehearsal_takes_every_part(tmp_path: Path) -> None:
    assert hour.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert set(statuses(tmp_path).values()) == {"done"}
    assert (tmp_path / "weights/decoding.md").exists()
    for name in ("decode", "memory"):
        assert json.loads((tmp_path / name / "profile.json").read_text())
    assert (tmp_path / "prefill/prefill.md").exists() and (tmp_path / "tower/tower.md").exists()
    assert (tmp_path / "serving/loads.md").exists()


NAME = "serving-qwen2.5-vl-7b"


def made_up() -> dict[str, Any]:
    """A result file: 20 requests a setting, the fastest first."""
    loads = [
        {
            "ratio": ratio, "clients": 8, "seconds": seconds,
            "requests": [
                {"first": 0.01 * factor * (k + 1), "total": 1.0, "pieces": 10} for k in range(20)
            ],
        }
        for ratio, seconds, factor in ((0.0, 10.0, 2), (0.75, 5.0, 1))
    ]  # fmt: skip
    about = {
        "model": "m", "engine": "vllm", "work": {"images": 2}, "date": "2026-11-26",
        "commit": "0" * 40, "versions": {"vllm": "1"}, "hardware": {"gpus": ["H100"]},
    }  # fmt: skip
    return {"table": NAME, "about": about, "loads": loads}


def test_the_table_follows_from_the_times(tmp_path: Path) -> None:
    assert percentile(list(range(1, 21)), 0.95) == 19 and percentile([3.0], 0.95) == 3.0
    file = ServingFile.model_validate(made_up())
    row = [cell.strip() for cell in table_lines(file.loads)[3].strip("|").split("|")]
    # The median of 10 … 200 ms is 105 ms, half of ratio 0's; 20 requests in 5 s, against 10 s.
    assert row == ["8", "0.75", "20", "0", "105", "190", "2.00", "4.00", "2.00", "40"]
    path = tmp_path / NAME / "H100.json"
    path.parent.mkdir()
    path.write_text(file.model_dump_json())
    assert read(path) == file
    assert recompute.main(["--results", str(tmp_path)]) == 0
    assert "| 8 | 0.75 | 20 | 0 | 105 |" in (tmp_path / "tables.md").read_text()


NAME_TABLES = "images-qwen2.5-vl-7b"
COMMIT = "0" * 40
SCORES = {  # by setting: right or wrong per item, and the answers
    "full": ([1, 1, 1, 0, 1, 1], "aabbcc"),
    "random-1": ([0, 1, 0, 0, 1, 1], "xabbcc"),
    "random-2": ([0, 1, 1, 0, 0, 1], "xabbyc"),
    "downscale": ([1, 0, 0, 0, 1, 1], "axxbcc"),
    "condiv": ([1, 1, 0, 0.8, 1, 1], "aaxycc"),
}


def write_runs(folder: Path, frames: int = 8, commit: str = COMMIT) -> Path:
    """Run folders as `tokencomp eval` leaves them."""
    for name, (scores, answers) in SCORES.items():
        reducer, _, seed = name.partition("-")
        ratio = 0.0 if reducer == "full" else 0.75
        identity = {
            "model": "m", "weights": "w", "dtype": "bfloat16", "tasks": ["t"], "data": ["d"],
            "limit": 6, "frames": frames, "reducer": reducer, "ratio": ratio,
            "options": {"seed": int(seed)} if seed else {},
        }  # fmt: skip
        manifest = {
            "identity": identity, "finished": True, "date": "2026-11-26", "commit": commit,
            "versions": {"torch": "2"}, "hardware": {"gpus": ["H100"]},
            "scores": {"t": {"acc": sum(scores) / 6}}, "summary": {"items": 6, "failed": 0},
        }  # fmt: skip
        cost = {"ratio": ratio, "flops": 100 * (1 - ratio), "kv_bytes": 9, "seconds": 0.5}
        records = [
            {"id": f"t/{i}", "family": "ab"[i % 2], "prompt": "?", "prediction": text,
             "answer": "a", "correct": score, "per_layer": [100, 100 * (1 - ratio)], **cost}
            for i, (score, text) in enumerate(zip(scores, answers, strict=True))
        ]  # fmt: skip
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text(json.dumps(manifest))
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (folder / name / "records.jsonl").write_text(lines)
    return folder


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """A folder of results with one file."""
    file = collect(NAME_TABLES, [write_runs(tmp_path / "runs")])
    path = tmp_path / "results" / NAME_TABLES / "H100.json"
    path.parent.mkdir(parents=True)
    path.write_text(file.model_dump_json())
    return tmp_path / "results"


def test_tables_follow_from_the_bits(sent: Path) -> None:
    """The row of condiv, from the scores above by hand."""
    assert recompute.main(["--results", str(sent)]) == 0
    lines = (sent / "tables.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| condiv"))
    cells = dict(
        zip(recompute.COLUMNS, (c.strip() for c in row.strip("|").split("|")), strict=True)
    )
    own, full = [1, 1, 0, 1, 1, 1], SCORES["full"][0]
    random = [
        (a + b) / 2 for a, b in zip(SCORES["random-1"][0], SCORES["random-2"][0], strict=True)
    ]
    assert cells["accuracy"] == "83.3%" and cells["visual tokens"] == "62"
    assert cells["vs full"] == str(difference(own, full))
    assert cells["vs random"] == str(difference(own, random))
    assert cells["vs downscale"] == str(difference(own, SCORES["downscale"][0]))
    assert cells["where downscale fails"] == "67% of 3"  # items 1, 2 and 3: right, wrong, right
    assert cells["same answer as full"] == "67%" and cells["FLOPs"] == "25%"
