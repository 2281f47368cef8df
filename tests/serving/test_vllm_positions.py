"""Real engines with media split over chunks, times between frames, and long videos."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.serving import cases, hf_reference
from support.serving.checks import batch, check

MODELS = ("qwen2_vl", "llava_onevision", "qwen3_vl", "internvl")
TIGHT = {"max_num_batched_tokens": 64, "max_num_seqs": 4}


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


def test_qwen2_5_times_between_frames(tiny_folder: Any, run_engine: Any) -> None:
    model, folder = "qwen2_5_vl", tiny_folder("qwen2_5_vl")
    jobs = [cases.job(model, [cases.IMAGE], 0.5), cases.job(model, [cases.VIDEO], 0.5)]
    jobs += [cases.job(model, [cases.VIDEO, cases.OTHER], 0.7, reducer="random")]
    results = run_engine(folder, [[j] for j in jobs] + [batch(jobs, " together")])
    for job in jobs:
        with hf_reference.with_true_positions(folder, job):
            check(results, [job], folder, model)
            check(results, [job], folder, model, " together")


def test_qwen3_vl_moe(tiny_folder: Any, run_engine: Any) -> None:
    model, folder = "qwen3_vl_moe", tiny_folder("qwen3_vl_moe")
    jobs = [cases.job(model, [cases.IMAGE], 0.5, reducer="divprune")]
    jobs += [cases.job(model, [cases.VIDEO, cases.OTHER], 0.7, reducer="bipartite")]
    check(run_engine(folder, [[job] for job in jobs]), jobs, folder, model)


@pytest.mark.parametrize("model", ["qwen3_5", "qwen3_5_moe"])
def test_layers_with_linear_attention(model: str, tiny_folder: Any, run_engine: Any) -> None:
    """A dropped token is not in the sequence that linear attention reads.

    vLLM's linear attention on a CPU runs in bfloat16 only, so positions and lengths are compared
    exactly, and the first token's log-probability within the error of bfloat16. Over all prompts,
    it is nearer to the reference than to the uncompressed model.
    """
    folder = tiny_folder(model)
    media = ([cases.IMAGE], [cases.VIDEO], [cases.OTHER, cases.VIDEO, cases.IMAGE])
    jobs = [cases.job(model, m, 0.75, positions=True) for m in media]
    plain = [cases.job(model, m, 0.0) for m in media]
    runs = [[job] for job in [*jobs, *plain]]
    results = run_engine(folder, runs, dtype="bfloat16", max_num_batched_tokens=64)
    errors, effects = [], []
    for job, uncompressed in zip(jobs, plain, strict=True):
        want, full = (hf_reference.answer_of_kept(folder, j) for j in (job, uncompressed))
        got = results[job["name"]]
        assert "error" not in got, got
        assert got["prompt"] == want["prompt"] < full["prompt"]
        seen = torch.cat([torch.tensor(p) for p in got["positions"]], dim=1)[:, : got["prompt"]]
        assert torch.equal(seen, hf_reference.true_positions(folder, job)[:, want["kept"]])
        errors.append(abs(got["logprobs"][0] - want["logprobs"][0]))
        effects.append(abs(got["logprobs"][0] - full["logprobs"][0]))
    assert max(errors) < 0.1 and sum(errors) < sum(effects), (errors, effects)


def test_frames_that_are_spans(tiny_folder: Any, run_engine: Any) -> None:
    """GLM-4.1V: every frame keeps its share, and the seconds between frames stay."""
    folder = tiny_folder("glm4v")
    jobs = [cases.job("glm4v", [m], r) for m in (cases.IMAGE, cases.VIDEO) for r in (0.5, 0.75)]
    # transformers refuses a prompt of images and videos, as both have the same placeholder.
    jobs.append(cases.job("glm4v", [cases.OTHER, cases.IMAGE], 0.75))
    plain = cases.job("glm4v", [cases.VIDEO], None)
    runs = [[job] for job in [*jobs, plain]] + [batch(jobs, " together")]
    engine = {"max_num_batched_tokens": 64, "limit_mm_per_prompt": {"image": 4, "video": 1}}
    results = run_engine(folder, runs, **engine)
    check(results, [plain], folder, "glm4v")
    for suffix in ("", " together"):
        check(results, jobs, folder, "glm4v", suffix, hf_reference.answer_of_kept)


# A video of Qwen3-VL and its timestamps must fit into the engine's encoder cache of 4096 rows.
LONG = [("qwen2_vl", "float32", 640), ("qwen2_vl", "bfloat16", 640), ("qwen3_vl", "float32", 400)]


@pytest.mark.parametrize(("model", "dtype", "frames"), LONG)
def test_every_position_of_a_long_video(
    model: str, dtype: str, frames: int, tiny_folder: Any, run_engine: Any
) -> None:
    folder = tiny_folder(model)
    video = ["video", 2, frames, 56, 56]
    job = cases.job(model, [video], 0.5, reducer="random", positions=True)
    engine = {"max_num_batched_tokens": 512, "max_model_len": 8192}
    results = run_engine(folder, [[job]], dtype=dtype, **engine)
    with hf_reference.with_true_positions(folder, job):
        want = hf_reference.answer(folder, job)
    got = results[job["name"]]
    assert "error" not in got, got
    steps = [torch.tensor(p) for p in got["positions"]]
    seen = torch.cat(steps, dim=1)[:, : got["prompt"]]
    true = hf_reference.true_positions(folder, job)[:, want["kept"]]
    assert len(steps) > 2 and int(true.max()) > 300  # chunked, beyond 8 bits
    assert torch.equal(seen, true)
    naive = true.to(torch.bfloat16).long()  # the error of absolute positions in 16 bits
    assert int((naive != true).any(0).sum()) > 50
    if dtype == "float32":
        assert got["tokens"] == want["tokens"]
