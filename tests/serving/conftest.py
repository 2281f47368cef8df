"""Fixtures of the serving tests: tiny models, and a server and vLLM engines as processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
HAS_VLLM = importlib.util.find_spec("vllm") is not None
ENGINE_SECONDS = 1200


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function that returns the folder of a tiny random model by name, built at the first call."""
    from support.serving.models import BUILDERS

    root = tmp_path_factory.mktemp("models")

    @cache
    def build(name: str) -> Path:
        folder = root / name
        folder.mkdir()
        return BUILDERS[name](folder)

    return build


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function that runs jobs in a vLLM engine with its own process, see `vllm_driver`."""
    if not HAS_VLLM:
        pytest.skip("vllm is not installed (pip install '.[vllm]')")
    root = tmp_path_factory.mktemp("engines")

    def run(model: Path, runs: list[list[dict]], plugin: bool = True, **engine: Any) -> dict:
        if plugin:  # without any option the plugin stays out of the way
            engine.setdefault("hf_overrides", {"tokencomp": {}})
        jobs, results = root / "jobs.json", root / "results.json"
        results.unlink(missing_ok=True)
        jobs.write_text(json.dumps({"engine": engine, "runs": runs}))
        env = {**os.environ, "TOKENCOMP_VLLM": "on" if plugin else "off"}
        words = ["-m", "support.serving.vllm_driver", str(model), str(jobs), str(results)]
        process = subprocess.run(
            [sys.executable, *words],
            cwd=TESTS,
            env=env,
            capture_output=True,
            text=True,
            timeout=ENGINE_SECONDS,
        )
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
        return {"log": process.stderr + process.stdout, **json.loads(results.read_text())}

    return run


@pytest.fixture(scope="session")
def run_roles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function that runs engines in turn, each in another process, see `roles_driver`."""
    if not HAS_VLLM:
        pytest.skip("vllm is not installed (pip install '.[vllm]')")
    root = tmp_path_factory.mktemp("roles")

    def run(model: Path, steps: list[dict]) -> dict:
        plan, results = root / "steps.json", root / "results.json"
        results.unlink(missing_ok=True)
        plan.write_text(json.dumps(steps))
        words = ["-m", "support.serving.roles_driver", str(model), str(plan), str(results)]
        process = subprocess.run(
            [sys.executable, *words], cwd=TESTS, capture_output=True, text=True,
            timeout=ENGINE_SECONDS, env={**os.environ, "TOKENCOMP_VLLM": "on"},
        )  # fmt: skip
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
        found: dict = json.loads(results.read_text())
        return found

    return run
