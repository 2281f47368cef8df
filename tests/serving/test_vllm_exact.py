"""A real engine with the plugin, against stock vLLM and against the patched Hugging Face model."""

from __future__ import annotations

from typing import Any

import pytest
import serving_cases as cases
import torch

MODELS = ("qwen2_vl", "llava_onevision")
POSITIONS = {"llava_onevision": "compact"}
TIGHT = {"max_num_batched_tokens": 64, "max_num_seqs": 4}


def check(results: dict, jobs: list[dict], folder: Any, model: str, suffix: str = "") -> None:
    """Tokens equal, log-probabilities within 1e-3, prompt lengths exact."""
    import hf_reference

    for job in jobs:
        got = results[job["name"] + suffix]
        want = hf_reference.answer(folder, job, POSITIONS.get(model, "original"))
        assert "error" not in got, (job["name"], got)
        assert got["prompt"] == want["prompt"], job["name"]
        assert got["tokens"] == want["tokens"], job["name"]
        torch.testing.assert_close(
            torch.tensor(got["logprobs"]), torch.tensor(want["logprobs"]), atol=1e-3, rtol=0
        )


def batch(jobs: list[dict], suffix: str) -> list[dict]:
    """The same jobs, to be submitted together, with empty caches."""
    return [{**job, "name": job["name"] + suffix, "reset": True} for job in jobs]


@pytest.fixture(scope="module", params=MODELS)
def answered(request: pytest.FixtureRequest, tiny_folder: Any, run_engine: Any) -> tuple:
    """One engine over the whole matrix: one by one, all at once, and the cache probes."""
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
    """Same image with other ratios, then with another question."""
    runs = []
    for i, ratio in enumerate((0.5, 0.3, 0.5, 0.0, 0.7)):
        made = cases.job(model, [cases.IMAGE], ratio)
        runs.append([{**made, "name": f"cache {i}", "reset": i == 0}])
    other = cases.job(model, [cases.IMAGE], 0.5, "What shape is the red object?")
    return [*runs, [{**other, "name": "cache question"}]]


def error_runs(model: str) -> list[list[dict]]:
    """Requests that must be refused one by one, and a good one afterwards."""
    wrong = [
        {"ratio": 1.5}, {"ratio": "much"}, {"ratio": 0.99}, {"reducer": "nothing", "ratio": 0.5},
        {"reducer": "fastv", "ratio": 0.5}, {"ratoi": 0.5}, {"ratio": float("nan")}, [0.5],
        {"reducer": "uniform", "ratio": 0.5, "options": {"x": 1}},
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
    assert cached[2] > 0  # a known one
    assert results["cache question"]["cached"] > 0  # the same media before another question


def test_bad_options_are_refused_and_the_engine_lives(answered: tuple) -> None:
    model, folder, results = answered
    *bad, good = (run[0] for run in error_runs(model))
    for job in bad:
        message = results[job["name"]]["error"]
        assert message.startswith(("OptionError", "RatioError", "ValueError")), message
        assert any(w in message for w in ("ratio", "reducer", "expected", "Allowed")), message
    assert "uniform" in results["wrong 4"]["error"]  # a reducer with layer stages: names the others
    check(results, [good], folder, model)


@pytest.mark.parametrize("model", MODELS)
def test_media_split_over_prefill_chunks(model: str, tiny_folder: Any, run_engine: Any) -> None:
    folder = tiny_folder(model)
    jobs = [
        cases.job(model, [cases.IMAGE, cases.VIDEO, cases.OTHER], 0.2),
        cases.job(model, [cases.OTHER, cases.IMAGE], 0.1, reducer="random"),
        cases.job(model, [cases.VIDEO], 0.2, "What " * 120 + "is it?"),
    ]
    runs = [[j] for j in jobs] + [batch(jobs, " together")] + [batch(jobs, " again")]
    results = run_engine(folder, runs, **TIGHT)
    for suffix in ("", " together", " again"):
        check(results, jobs, folder, model, suffix)
    for job in jobs:  # every prompt needs several chunks of at most 64 tokens
        assert results[job["name"]]["prompt"] > 2 * TIGHT["max_num_batched_tokens"]


def test_qwen2_5_frames_apart_in_time(tiny_folder: Any, run_engine: Any) -> None:
    import hf_reference

    model = "qwen2_5_vl"
    folder = tiny_folder(model)
    jobs = [cases.job(model, [cases.IMAGE], 0.5), cases.job(model, [cases.VIDEO], 0.5)]
    jobs += [cases.job(model, [cases.VIDEO, cases.OTHER], 0.7, reducer="random")]
    results = run_engine(folder, [[j] for j in jobs] + [batch(jobs, " together")])
    for job in jobs:
        with hf_reference.with_true_positions(folder, job):
            check(results, [job], folder, model)
            check(results, [job], folder, model, " together")


def test_trained_model_on_real_files(run_engine: Any, tmp_path: Any) -> None:
    """The packaged model on ShapesQA media: same answers in both homes at every ratio."""
    import hf_reference

    from tokencomp.evaluation.answering import chat_text
    from tokencomp.evaluation.examples import shapesqa
    from tokencomp.zoo import model_path
    from tokencomp.zoo.shapesqa import items

    folder = model_path("tiny-qwen2-vl")
    _, processor = hf_reference.load(folder)
    jobs = []
    for i, example in enumerate(shapesqa(items("test", 1), tmp_path)):
        loaded = example.load(8)
        kinds = ["video" if isinstance(m, list) else "image" for m in loaded]
        media = [[kind, str(path)] for kind, path in zip(kinds, example.media, strict=True)]
        prompt = chat_text(processor, loaded, example.prompt)
        spec = {"ratio": (0.5, 0.75, 0.9)[i % 3]}
        jobs.append({"name": f"item {i}", "prompt": prompt, "media": media, "tokencomp": spec})
    results = run_engine(folder, [jobs])
    check(results, jobs, folder, "qwen2_vl")
    assert {job["media"][0][0] for job in jobs} == {"image", "video"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_position_of_a_long_video(dtype: str, tiny_folder: Any, run_engine: Any) -> None:
    import hf_reference

    folder, frames = tiny_folder("qwen2_vl"), 640
    video = ["video", 2, frames, 56, 56]
    job = cases.job("qwen2_vl", [video], 0.5, reducer="random", positions=True)
    results = run_engine(folder, [[job]], dtype=dtype, max_num_batched_tokens=512)
    with hf_reference.with_true_positions(folder, job):
        want = hf_reference.answer(folder, job)
    got = results[job["name"]]
    steps = [torch.tensor(p) for p in got["positions"]]
    seen = torch.cat(steps, dim=1)[:, : got["prompt"]]
    true = hf_reference.true_positions(folder, job)[:, want["kept"]]
    assert len(steps) > 2 and int(true.max()) > 300  # chunked, beyond 8 bits
    assert torch.equal(seen, true)
    naive = true.to(torch.bfloat16).long()  # what 16-bit absolute positions would have been
    assert int((naive != true).any(0).sum()) > 50
    if dtype == "float32":
        assert got["tokens"] == want["tokens"]
