"""The stage in the vision tower of a real engine equals that of the patched Hugging Face model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.serving import cases, hf_reference
from support.serving.checks import batch, check

pytest.importorskip("vllm", reason="vllm is not installed")

MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
EVERY = [cases.IMAGE, cases.VIDEO, cases.OTHER]


def jobs_of(model: str) -> list[dict[str, Any]]:
    """Return jobs that cover media, reducers of both stages, and ratios of the tower."""
    job = cases.job
    jobs = [job(model, [m], 0.75, tower_ratio=0.6) for m in (*EVERY, cases.ODD)]
    jobs.append(job(model, EVERY, 0.75, tower_ratio=0.5, reducer="divprune"))
    jobs.append(job(model, EVERY, 0.75, tower_ratio=0.75, reducer="divprune"))
    jobs.append(job(model, EVERY, 0.9, tower_ratio="auto", reducer="bipartite"))
    jobs.append(job(model, EVERY, 0.9, budget=20, tower_ratio="auto", reducer="divprune"))
    for name in ("random", "uniform", "runlength"):
        tower = {"tower_ratio": 0.4, "tower_reducer": name}
        jobs.append(job(model, [cases.VIDEO, cases.IMAGE], 0.5, reducer="divprune", **tower))
    jobs.append(job(model, [cases.IMAGE], 0.95, tower_ratio=0.94))
    return jobs


STEPS = [["image", 4, 168, 280, changed] for changed in (0, 1, 1, 3)]


def compared(model: str) -> list[dict[str, Any]]:
    """Return steps of an agent, then the same pictures after others, and with more options.

    The last pictures before the fifth job are in caches, and what was kept of them is not.
    """
    jobs = [cases.job(model, STEPS[:n], 0, reducer="delta") for n in (1, 3, 2, 4)]
    others = [*STEPS[:2], [*STEPS[0][:4], 5]], STEPS[2:], [cases.IMAGE, STEPS[3]]
    jobs += [cases.job(model, media, 0, reducer="delta") for media in others]
    jobs.append(cases.job(model, [cases.VIDEO, *STEPS[:2]], 0, reducer="delta"))
    jobs.append(cases.job(model, STEPS[:2], 0.75, reducer="delta", options={"then": "kcenter"}))
    threshold = 99 if model.startswith("qwen2") else 0  # the tiny Qwen3-VL scales pixels as those
    options = {"threshold": threshold, "then": "kcenter"}
    jobs.append(cases.job(model, STEPS[:2], 0, budget=9, reducer="pixelprune", options=options))
    return jobs


@pytest.fixture(scope="module", params=MODELS)
def answered(request: pytest.FixtureRequest, tiny_folder: Any, run_engine: Any) -> tuple:
    model = request.param
    jobs, folder = [*jobs_of(model), *compared(model)], tiny_folder(model)
    shared = [cases.job(model, [cases.IMAGE], 0.75, reducer="divprune", **t) for t in TOWERS]
    shared = [{**job, "name": f"cache {i}", "reset": i == 0} for i, job in enumerate(shared)]
    runs = [[j] for j in jobs] + [batch(jobs, " together")] + [[j] for j in shared]
    again = [{**job, "name": job["name"] + " again"} for job in compared(model)]
    runs += [[{**again[0], "reset": True}], *([j] for j in again[1:])]
    results = run_engine(folder, runs, max_num_batched_tokens=128)
    return model, folder, jobs, shared, results


TOWERS = [{}, {"tower_ratio": 0.5}, {"tower_ratio": 0.6}, {"tower_ratio": 0.5}, {"tower_ratio": 0}]


def compare(results: Any, jobs: Any, folder: Any, model: str, *suffixes: str) -> None:
    for job in jobs:
        with hf_reference.with_true_positions(folder, job):
            want = hf_reference.answer(folder, job)
        for suffix in suffixes or ("",):
            check(results, [job], folder, model, suffix, lambda *_, want=want: want)


def test_equals_the_patched_model(answered: tuple) -> None:
    """One by one, and together, where calls of the tower have several stages, in chunks."""
    model, folder, jobs, _, results = answered
    compare(results, jobs, folder, model, "", " together")


def test_warm_caches_answer_as_cold_ones_where_pictures_are_compared(answered: tuple) -> None:
    """A step reuses what the steps before it computed; after other pictures it is another item."""
    model, folder, _, _, results = answered
    compare(results, compared(model), folder, model, " again")
    cached = [results[job["name"] + " again"]["cached"] for job in compared(model)]
    assert cached[0] == 0 < min(cached[1:4])


def test_caches_keep_tower_ratios_apart(answered: tuple) -> None:
    model, folder, _, shared, results = answered
    compare(results, shared, folder, model)
    cached = [results[job["name"]]["cached"] > 0 for job in shared]
    assert cached == [False, False, False, True, True]


def test_linear_layers_do_not_see_what_the_tower_dropped(tiny_folder: Any, run_engine: Any) -> None:
    """Qwen3.5 runs in bfloat16 only, so kept positions are compared, which are exact.

    The patched model takes every frame of a video for a span, so only images can be compared.
    """
    folder, tower = tiny_folder("qwen3_5"), {"tower_ratio": 0.5, "tower_reducer": "random"}
    media = ([cases.IMAGE], [cases.OTHER, cases.IMAGE])
    jobs = [cases.job("qwen3_5", m, 0.75, positions=True, **tower) for m in media]
    results = run_engine(folder, [[job] for job in jobs], dtype="bfloat16")
    for job in jobs:
        want, got = hf_reference.answer(folder, job), results[job["name"]]
        assert "error" not in got, got
        assert got["prompt"] == want["prompt"]
        seen = torch.cat([torch.tensor(p) for p in got["positions"]], dim=1)[:, : got["prompt"]]
        assert torch.equal(seen, hf_reference.true_positions(folder, job)[:, want["kept"]])
