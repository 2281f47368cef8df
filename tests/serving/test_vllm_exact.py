"""A real engine with the plugin equals stock vLLM and the patched Hugging Face model."""

from __future__ import annotations

from typing import Any

import pytest
from support.serving import cases
from support.serving.checks import batch, check

MODELS = ("qwen2_vl", "llava_onevision", "qwen3_vl", "internvl")


@pytest.fixture(scope="module", params=MODELS)
def answered(request: pytest.FixtureRequest, tiny_folder: Any, run_engine: Any) -> tuple:
    """Run the whole matrix on one engine: one by one, all together, and for its caches."""
    model = request.param
    folder = tiny_folder(model)
    jobs = cases.matrix(model)
    plain = [{**job, "reset": True} for job in cases.plain(model)]
    zero = [{**job, "tokencomp": {"ratio": 0}, "name": job["name"] + " 0"} for job in plain]
    runs = [[j] for j in jobs] + [batch(jobs, " together")] + [[j] for j in plain]
    runs += [[{**j, "reset": True}] for j in zero] + cache_runs(model) + error_runs(model)
    results = run_engine(folder, runs)
    return model, folder, results


def cache_runs(model: str) -> list[list[dict]]:
    """Return runs of one image with several ratios, then with another question."""
    runs = []
    for i, ratio in enumerate((0.5, 0.3, 0.5, 0.0, 0.7)):
        case = cases.job(model, [cases.IMAGE], ratio)
        runs.append([{**case, "name": f"cache {i}", "reset": i == 0}])
    other = cases.job(model, [cases.IMAGE], 0.5, "What shape is the red object?")
    return [*runs, [{**other, "name": "cache question"}]]


def error_runs(model: str) -> list[list[dict]]:
    """Return requests that must be refused, and a valid one after them."""
    wrong = [
        {"ratio": 1.5}, {"ratio": "much"}, {"ratio": 0.99}, {"reducer": "nothing", "ratio": 0.5},
        {"reducer": "fastv", "ratio": 0.5}, {"ratoi": 0.5}, {"ratio": float("nan")}, [0.5],
        {"reducer": "uniform", "ratio": 0.5, "options": {"x": 1}}, {"ratio": 0.5, "budget": 8},
        {"budget": 0}, {"budget": 1.5}, {"budget": {"prompt": 8}},
    ]  # fmt: skip
    base = cases.job(model, [cases.IMAGE], 0.5)
    bad = [[{**base, "tokencomp": w, "name": f"wrong {i}"}] for i, w in enumerate(wrong)]
    return [*bad, [{**base, "name": "alive"}]]


def test_equals_the_patched_model(answered: tuple) -> None:
    model, folder, results = answered
    jobs = cases.matrix(model)
    check(results, jobs, folder, model)
    check(results, jobs, folder, model, " together")


def test_ratio_zero_is_stock_vllm(answered: tuple, run_engine: Any) -> None:
    model, folder, results = answered
    plain = cases.plain(model)
    runs = [[{**job, "reset": True}] for job in plain]
    stock = run_engine(folder, runs, plugin=False)
    assert "tokencomp" not in stock["log"]
    for job in plain:
        for name in (job["name"], job["name"] + " 0"):
            assert results[name]["prompt"] == stock[job["name"]]["prompt"]
            assert results[name]["tokens"] == stock[job["name"]]["tokens"]
            assert results[name]["logprobs"] == stock[job["name"]]["logprobs"]


def test_caches_keep_ratios_apart(answered: tuple) -> None:
    model, folder, results = answered
    jobs = [run[0] for run in cache_runs(model)]
    check(results, jobs, folder, model)
    cached = [results[f"cache {i}"]["cached"] for i in range(5)]
    assert cached[0] == cached[1] == 0 and cached[4] == 0  # new ratios
    assert cached[2] > 0  # a ratio that is in the cache
    assert results["cache question"]["cached"] > 0  # the same media before another question


REFUSALS = ("OptionError", "RatioError", "UnknownNameError", "UnknownOptionError", "ValueError")


def test_bad_options_are_refused_and_the_engine_continues(answered: tuple) -> None:
    model, folder, results = answered
    *bad, good = (run[0] for run in error_runs(model))
    for job in bad:
        message = results[job["name"]]["error"]
        assert message.startswith(REFUSALS), message
        assert any(w in message for w in ("ratio", "reducer", "expected", "Allowed", "budget")), (
            message
        )
    assert "uniform" in results["wrong 4"]["error"]  # the error of a reducer with layer stages
    check(results, [good], folder, model)
