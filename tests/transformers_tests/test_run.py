"""The comparison of outcomes; the runs themselves need a checkout of transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).parent
spec = importlib.util.spec_from_file_location("hf_run", FOLDER / "run.py")
assert spec is not None and spec.loader is not None
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


def test_expected_differences_have_reasons_and_none_at_ratio_0() -> None:
    entries = json.loads((FOLDER / "expected.json").read_text())["differences"]
    assert all(e["ratio"] != "0" and e["reason"] for e in entries)
    name = "Qwen2VLModelTest::test_past_key_values_format"
    assert "fewer" in run.expected_reason(entries, "qwen2_vl", "0.5", name, "failed: x")
    assert run.expected_reason(entries, "qwen2_vl", "0", name, "failed: x") == ""
