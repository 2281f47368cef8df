"""Tables for readers with a GPU: files from run folders, their schema, and the tables from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import recompute
from benchmarks.gpu.contribution import collect
from tokencomp.evaluation.metrics import difference

NAME = "images-qwen2.5-vl-7b"
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
    file = collect(NAME, [write_runs(tmp_path / "runs")])
    path = tmp_path / "results" / NAME / "H100.json"
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
