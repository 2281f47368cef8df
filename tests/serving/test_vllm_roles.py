"""Encoder, prefill and decode in different processes answer as one process does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import torch
from safetensors import safe_open
from support.serving import cases

LONGEST = 12  # tokens of an answer
PIPELINE = "support.serving.pipeline_on_cpu.Extension"
EC, KV = "ECExampleConnector", "ExampleConnector"
RATIOS = (0, 0.5, 0.75, 0.9, None)  # None: the server's


def prompts(model: str, merge: bool) -> list[dict[str, Any]]:
    """Return 20 jobs of one to three images and clips with all ratios; some of them drop."""
    jobs = []
    for i in range(20):
        media: list[list[Any]] = [["image", 10 + i, 224 + 28 * (i % 3), 140 + 28 * (i % 4)]]
        media += [["image", 50 + i, 112, 168], ["video", 70 + i, 6, 112, 84]][: i % 3]
        job = cases.job(model, media, RATIOS[i % 5], reducer="kcenter", tokens=LONGEST)
        if merge and i % 2 and "tokencomp" in job:
            job["tokencomp"]["merge"] = False
        jobs.append({**job, "name": f"{i} {job['name']}"})
    return jobs


def items(jobs: list[dict[str, Any]]) -> int:
    return sum(len(job["media"]) for job in jobs)


def engine(folder: Path, ec: str = "", kv: str = "", **more: Any) -> dict[str, Any]:
    """Arguments of an engine with roles, whose connectors keep files below `folder`."""
    found = dict(more)
    if ec:
        found["ec_transfer_config"] = {
            "ec_connector": EC, "ec_role": ec,
            "ec_connector_extra_config": {"shared_storage_path": str(folder / "ec")},
        }  # fmt: skip
    if kv:
        found["kv_transfer_config"] = {
            "kv_connector": KV, "kv_role": kv,
            "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
        }  # fmt: skip
    return found


def check(one: dict[str, Any], other: dict[str, Any], names: list[str], suffix: str = "") -> None:
    """Require equal tokens, and equal log-probabilities, which see more than tokens."""
    for name in names:
        want, got = one[name], other[name + suffix]
        assert got["tokens"] == want["tokens"], name
        torch.testing.assert_close(
            torch.tensor(got["logprobs"]), torch.tensor(want["logprobs"]), atol=1e-4, rtol=0
        )


@pytest.fixture(scope="module", params=[("qwen2_vl", True), ("qwen3_vl", False)], ids=str)
def answered(
    request: pytest.FixtureRequest, tiny_folder: Any, run_roles: Any, tmp_path_factory: Any
) -> tuple:
    """One process; an encoder killed halfway; prefill without it; all three roles, twice."""
    model, merge = request.param
    jobs, store = prompts(model, merge), tmp_path_factory.mktemp("store")
    options = {"tokencomp": {"ratio": 0.5, "reducer": "kcenter", "merge": merge}}
    encodes = [{**job, "tokens": 1} for job in jobs]
    other = {"tokencomp": {**options["tokencomp"], "ratio": 0.75}}
    unnamed = [job for job in jobs if "tokencomp" not in job]
    named = [{**job, "tokencomp": other["tokencomp"]} for job in unnamed]
    twice = [jobs, [{**job, "name": job["name"] + " warm"} for job in jobs]]
    steps = [
        ("one", {}, [jobs, [{**job, "name": job["name"] + " named"} for job in named]]),
        ("half", engine(store, "ec_producer"), [encodes[:10]]),
        ("alone", engine(store, "ec_consumer"), [jobs]),
        ("encode", engine(store, "ec_producer"), [encodes]),
        ("prefill", engine(store, "ec_consumer", "kv_producer"), twice),
        ("decode", engine(store, "", "kv_consumer"), twice),
        ("differs", engine(store, "", "kv_consumer", hf_overrides=other), [unnamed]),
    ]  # fmt: skip
    steps.append(
        ("pipeline", {"pipeline_parallel_size": 2, "worker_extension_cls": PIPELINE}, [jobs])
    )
    if merge:
        data = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}
        steps.append(("tensor", data, [jobs]))
    plans = [
        {"name": name, "engine": {"hf_overrides": options, **more}, "runs": runs,
         "kill": name == "half"}
        for name, more, runs in steps
    ]  # fmt: skip
    return jobs, run_roles(tiny_folder(model), plans), store, merge


def test_every_role_answers_as_one_process(answered: tuple) -> None:
    jobs, results, _, _ = answered
    names = [job["name"] for job in jobs]
    one = results["one"]["runs"][0]
    assert len({tuple(one[name]["logprobs"]) for name in names}) == len(names)
    for role in ("prefill", "decode"):
        cold, warm = results[role]["runs"]
        check(one, cold, names)
        check(one, warm, names, " warm")
    assert all(warm[f"{name} warm"]["cached"] for name in names if one[name]["prompt"] > 64)


def test_the_encoder_alone_encodes(answered: tuple) -> None:
    """One that was killed has left what it had done; the rest is encoded where it is missing."""
    jobs, results, _, _ = answered
    check(results["one"]["runs"][0], results["alone"]["runs"][0], [job["name"] for job in jobs])
    assert results["half"]["encoded"] == items(jobs[:10])
    assert results["alone"]["encoded"] == items(jobs[10:])
    assert results["prefill"]["encoded"] == 0
    assert results["decode"]["encoded"] < items(jobs)  # those that reach into the last block


def test_stages_of_a_pipeline_and_parallel_encoders(answered: tuple) -> None:
    """Later stages see no media: positions and sizes of rows come from the first."""
    jobs, results, _, merge = answered
    for name in ("pipeline", "tensor") if merge else ("pipeline",):
        check(results["one"]["runs"][0], results[name]["runs"][0], [job["name"] for job in jobs])


def test_blocks_of_another_ratio_are_not_found(answered: tuple) -> None:
    jobs, results, _, _ = answered
    one, differs = results["one"]["runs"][1], results["differs"]["runs"][0]
    for job in jobs:
        if "tokencomp" not in job:
            check({job["name"]: one[job["name"] + " named"]}, differs, [job["name"]])


def test_rows_have_the_width_that_connectors_announce(answered: tuple) -> None:
    """Connectors of vLLM size a transfer by it; a wider row ends the engine."""
    from types import SimpleNamespace

    from vllm.distributed.ec_transfer.ec_connector.cpu.scheduler import ECCPUScheduler
    from vllm.distributed.ec_transfer.ec_connector.mooncake.scheduler import ECMooncakeScheduler

    _, results, store, _ = answered
    widths, shapes = results["encode"]["widths"], []
    for file in sorted(store.glob("ec/*/encoder_cache.safetensors")):
        with safe_open(file, "pt") as content:
            shapes.append(content.get_slice("ec_cache").get_shape())
    assert len(shapes) >= 39 and len(set(widths.values())) == 1
    config = SimpleNamespace(ec_transfer_config=SimpleNamespace(mm_encoder_output_widths=widths))
    for (rows, width), modality in itertools.product(shapes, widths):
        place = SimpleNamespace(get_num_embeds=lambda rows=rows: rows)
        feature = SimpleNamespace(modality=modality, mm_position=place, identifier="a")
        request = SimpleNamespace(
            mm_features=[feature], get_num_encoder_embeds=lambda index, rows=rows: rows
        )
        owner: Any = SimpleNamespace(
            _vllm_config=config, _model_config=SimpleNamespace(dtype=torch.float32)
        )
        spec = ECMooncakeScheduler._encoder_output_spec(owner, request, 0)
        assert spec.nbytes == rows * width * 4
        allotted: list[Any] = []
        owner = SimpleNamespace(
            _vllm_config=config, _is_producer=True, _is_consumer=False, _dtype=torch.float32,
            _region=SimpleNamespace(block_size_bytes=4096),
            _cache=SimpleNamespace(get=lambda _: None, alloc=lambda *a, to=allotted: to.append(a)),
        )  # fmt: skip
        owner._num_blocks = lambda shape, owner=owner: ECCPUScheduler._num_blocks(owner, shape)
        ECCPUScheduler.update_state_after_alloc(owner, request, 0)
        ((_, blocks, shape),) = allotted
        assert shape == (rows, width) and blocks * 4096 >= rows * width * 4
