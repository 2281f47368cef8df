"""The self-test of a card, with faults: Triton's interpreter stands for the card."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernel_faults import ENDS, WRONG, broken

pytest.importorskip("triton")

from tokencomp.kernels import cases, dispatch, run_cases, selftest, topk_stable

CPU = torch.device("cpu")
SUPPORT = Path(__file__).parents[1] / "support"
EVERY = list(selftest.OPS)
FEW = ("gather_rows", "topk_stable", "mean_distance")
SCORES = torch.tensor([3.0, 1.0, 3.0, 2.0, 5.0])
BEST = [0, 2, 4]  # of five scores, by hand


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Mode `auto`, in which CPU tensors are those of a card; returns its empty cache."""
    monkeypatch.setenv("TOKENCOMP_KERNELS", "auto")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(selftest, "_known", {})
    monkeypatch.setattr(dispatch, "which", lambda x: "triton")
    monkeypatch.setattr(selftest, "OPS", list(FEW))
    path = [SUPPORT / "faults", SUPPORT.parent, SUPPORT.parents[1], os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(p) for p in path if p))
    return tmp_path / "cache"


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process knows."""
    monkeypatch.setattr(selftest, "_known", {})
    selftest.source_hash.cache_clear()


def no_tests(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a test ran")


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("op", EVERY)
def test_a_wrong_form_is_found(op: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENCOMP_KERNELS", "triton")
    module = importlib.import_module(f"tokencomp.kernels.{op}.triton")
    monkeypatch.setattr(module, op, broken(kind, getattr(module, op)))
    verdict = run_cases.test_op(op, CPU, torch.float32)
    assert not verdict.passed and verdict.final and op in verdict.why


@pytest.mark.parametrize("dtype", selftest.TESTED)
def test_right_forms_pass(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENCOMP_KERNELS", "triton")
    for op in FEW:
        verdict = run_cases.test_op(op, CPU, dtype)
        assert verdict.passed, verdict


@pytest.mark.parametrize("kind", [*ENDS, "raise", "tail"])
def test_a_fault_costs_a_warning_and_no_answer(
    kind: str, card: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "hang":
        monkeypatch.setattr(selftest, "OP_SECONDS", 20.0)
    monkeypatch.setenv("FAULT", f"{kind} topk_stable")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert topk_stable(SCORES, 3).tolist() == BEST
    warning = [r.getMessage() for r in caplog.records if "topk_stable" in r.getMessage()]
    assert len(warning) == 1 and len(caplog.records) == 1
    words = {"hang": "no result after 20 s", "killed": "signal 11", "raise": "shared memory"}
    assert words.get(kind, "case") in warning[0]
    passed = {v.op: v.passed for v in selftest.verdicts(CPU, torch.float32)}
    assert passed == {"gather_rows": True, "topk_stable": False, "mean_distance": True}
    # The next process reads the verdicts, and warns as well.
    another_process(monkeypatch)
    monkeypatch.setattr(selftest, "_test", no_tests)
    assert topk_stable(SCORES, 3).tolist() == BEST
    assert len(caplog.records) == 2


@pytest.mark.long
@pytest.mark.parametrize("kind", ENDS)
def test_each_op_that_ends_its_process(
    kind: str, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "OPS", EVERY)
    monkeypatch.setattr(selftest, "OP_SECONDS", 10.0)
    monkeypatch.setenv("FAULT", " ".join([kind, *EVERY]))
    found = selftest.verdicts(CPU, torch.float32)
    assert [v.op for v in found] == EVERY and not any(v.passed for v in found)


def test_verdicts_are_of_a_source(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(v.passed for v in selftest.verdicts(CPU, torch.float32))
    (file,) = (card / "tokencomp" / "kernels").iterdir()
    # A card that failed before, with an older source of the ops.
    stored = json.loads(file.read_text())
    old = {**stored, "source": "0", "ops": [{**row, "passed": False} for row in stored["ops"]]}
    for text in (json.dumps(old), "{", "[]", json.dumps({**stored, "ops": [{"op": "x", "y": 1}]})):
        file.write_text(text)
        another_process(monkeypatch)
        assert all(v.passed for v in selftest.verdicts(CPU, torch.float32)), text
        assert json.loads(file.read_text()) == stored


def test_a_folder_that_cannot_be_written(
    card: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card.write_text("a file")
    assert topk_stable(SCORES, 3).tolist() == BEST
    assert "XDG_CACHE_HOME" in caplog.text
    monkeypatch.setattr(selftest, "_test", no_tests)  # this process remembers
    assert selftest.passes("topk_stable", CPU, torch.float32)


def test_what_could_not_be_tested_is_tested_by_the_next_process(
    card: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for executable in ("/bin/false", str(card / "missing")):
        another_process(monkeypatch)
        monkeypatch.setattr(sys, "executable", executable)
        caplog.clear()
        assert topk_stable(SCORES, 3).tolist() == BEST
        assert len(caplog.records) == 1 and "no test ran" in caplog.text
        assert all(op in caplog.text for op in FEW)
    monkeypatch.undo()


def test_two_processes_at_once(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader finds the verdicts of one of the writers, whole."""
    path, note = selftest._note(CPU, torch.float32)
    sets = [[vars(selftest.Verdict(op, True, "x" * n)) for op in FEW] for n in (1, 100_000)]

    def write(rows: list[dict[str, Any]]) -> None:
        for _ in range(50):
            selftest._write(path, {**note, "ops": rows})

    writers = [threading.Thread(target=write, args=(rows,)) for rows in sets]
    selftest._write(path, {**note, "ops": sets[0]})
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len({len(v.why) for v in selftest._read(path, note).values()}) == 1
    assert list(path.parent.iterdir()) == [path]


def test_the_cases_reach_each_op() -> None:
    folders = {f.parent.name for f in (SUPPORT.parents[1] / "kernels").glob("*/triton.py")}
    assert set(map(cases.op_of, cases.CASES)) == set(EVERY) == folders
