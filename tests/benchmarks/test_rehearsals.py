"""The scripts of the benchmarks take all their steps on tiny models, and stop and go on."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.photographs import Drawings, toy

from benchmarks.models import prefill
from benchmarks.real import run
from recipes.photographs.model import build_processor
from tokencomp.storage import write_json

ROOT = Path(__file__).parents[2]
FACTS = {
    "command": "x", "date": "2026-01-01", "commit": "0" * 40, "versions": {},
    "hardware": {"cpu": "x", "threads": 1}, "finished": True, "stages": {"names": 1},
    "share": 1.0, "seconds": 1, "training_scores": {}, "trained_parameters": 1, "parameters": 1,
}  # fmt: skip


def test_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method reaches its ratio, and its page and tables appear."""
    monkeypatch.setattr(run, "MARGIN", -1.0)
    model, tokenizer = toy()
    processor = build_processor(tokenizer)
    args = argparse.Namespace(
        per_family=2, batch=18, frames=1,
        methods=("uniform", "downscale", "auto", "scope"), ratios=(0.75,),
    )  # fmt: skip
    pairs = {split: run.item_examples(Drawings(), split, 2) for split in ("validation", "test")}
    results = run.answer(model.eval(), processor, pairs, args, tmp_path)
    path = write_json(tmp_path / "r.json", {"environment": FACTS, "training": FACTS, **results})
    text, data = run.EXPERIMENT.files(path).values()
    by_label = {row["label"]: row for row in results["rows"]}
    assert by_label["auto at 0.75"]["reached"] == pytest.approx(0.75, abs=0.01)
    assert by_label["downscale at 0.75"]["visual_tokens"] == 49  # of 196
    assert len(by_label) == 1 + 3 + 5
    assert {"auto merge=False at 0.75", "scope merge=True saliency=none at 0.75"} < set(by_label)
    rows = {r["method"]: r for r in csv.DictReader(data.splitlines())}
    assert rows["downscale"]["visual_tokens"] == "49" and "random (3 seeds)" in rows
    assert f"| auto | {float(rows['auto']['accuracy']):.1%} |" in text


def test_prefill_of_real_shapes() -> None:
    """By default images are merged; a merged token is one row of the cache, as a kept one is."""
    methods = (("auto", "auto"), ("auto", False), ("uniform", False))
    piece = prefill.Piece("tiny", "image", 512, methods, (0.5, 0.75), 1, False, images=2)
    (records,) = prefill.measure(piece, torch.float32)
    assert [prefill.method_of(r) for r in records[::2]] == ["auto", "auto merge=False", "uniform"]
    assert {(r["kind"], r["visual_tokens"]) for r in records} == {("image", 512)}
    kept = [r["kv_bytes_compressed"] / r["kv_bytes_full"] for r in records]
    prompt = 512 + prefill.TEXT_BEFORE + prefill.TEXT_AFTER + 1
    assert kept == pytest.approx([(prompt - 256) / prompt, (prompt - 384) / prompt] * 3)


@pytest.mark.long
def test_kernels(tmp_path: Path) -> None:
    """One line per case and provider."""
    out, ops = tmp_path / "cpu.jsonl", ["topk_stable", "gather_rows"]
    command = ["-m", "benchmarks.kernels.run", "--scale", "0.01", "--repeats", "1", "--ops", *ops]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *command, "--out", str(out)], cwd=ROOT, env=env, check=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(r["op"], r["provider"]) for r in rows} == {
        (op, provider) for op in ops for provider in ("naive", "eager", "compile")
    }
    measured = [r for r in rows if "failed" not in r]  # compile needs a C++ compiler
    assert {r["provider"] for r in measured} >= {"naive", "eager"}
    for row in measured:
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["median_s"])
