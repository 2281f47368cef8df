"""Merging with weights in a real engine, and what it refuses."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import torch
from support.serving import cases, http
from support.serving.checks import check
from support.serving.processes import started
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.method import Method
from tokencomp.serving import launch
from tokencomp.serving.item_plan import ItemPlan, item_span
from tokencomp.serving.item_rows import reduce_rows
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm import checks, mrope, weighted
from tokencomp.serving.vllm.metrics import count_nonfinite
from tokencomp.serving.vllm.model import CompressingModel

BLOCK = 32  # rows of a block of the KV cache, see `vllm_driver`
COMPACT = ("llava_onevision", "internvl")
ENGINES = [
    ("qwen2_vl", {}),
    ("qwen3_vl", {"max_num_batched_tokens": 64}),  # prompts in chunks
    ("llava_onevision", {"max_num_batched_tokens": 64}),
    ("internvl", {}),
    pytest.param("qwen2_5_vl", {}, marks=pytest.mark.long),
    pytest.param("glm4v", {"max_num_batched_tokens": 64}, marks=pytest.mark.long),
    *(
        pytest.param(
            model,
            {"tensor_parallel_size": 2, "max_num_batched_tokens": 64},
            marks=pytest.mark.long,
            id=f"{model}-two-processes",
        )
        for model in ("qwen2_vl", "qwen3_vl", "llava_onevision", "internvl", "qwen2_5_vl")
    ),
]


def jobs_of(model: str) -> list[dict[str, Any]]:
    """Return jobs that merge and, in the same order, jobs that drop the same tokens."""
    media = [[cases.IMAGE], [cases.VIDEO], [cases.OTHER, cases.VIDEO, cases.IMAGE]]
    reducers, jobs = ("kcenter", "uniform"), []
    if model == "glm4v":  # its reference, `answer_of_kept`, knows one, and no videos with images
        reducers, media[2] = ("uniform",), [cases.OTHER, cases.IMAGE]
    for merge in (True, False):
        if model == "qwen2_vl":
            job = cases.job(model, [cases.IMAGE], 0.5, tower_ratio=0.25)
            job["tokencomp"]["merge"] = merge
            jobs.append({**job, "name": f"{job['name']} merge={merge}"})
        for reducer in reducers:
            for ratio, items in ((r, m) for r in (0.5, 0.75) for m in media):
                job = cases.job(model, items, ratio, reducer=reducer)
                job["tokencomp"]["merge"] = merge
                jobs.append({**job, "name": f"{job['name']} merge={merge}"})
    return jobs


@pytest.mark.parametrize(("model", "engine"), ENGINES)
def test_equals_the_patched_model(
    model: str, engine: dict[str, Any], tiny_folder: Any, run_engine: Any
) -> None:
    """Merged and dropped prompts share batches, first on empty caches, then on warm ones."""
    from support.serving import hf_reference

    def reference(folder: Any, job: dict[str, Any]) -> dict[str, Any]:
        if model == "glm4v":
            return hf_reference.answer_of_kept(folder, job)
        if model in COMPACT and job["tokencomp"]["merge"]:
            return hf_reference.answer_of_merged(folder, job)
        if model in COMPACT:
            return hf_reference.answer(folder, job, "compact")
        times = model == "qwen2_5_vl"  # transformers has other positions of its videos
        with hf_reference.with_true_positions(folder, job) if times else contextlib.nullcontext():
            return hf_reference.answer(folder, job)

    folder, jobs = tiny_folder(model), jobs_of(model)
    again = [{**job, "name": job["name"] + " again"} for job in reversed(jobs)]
    runs = [[{**job, "reset": True} for job in jobs], again]
    results = run_engine(folder, runs, hf_overrides={"tokencomp": {"merge": True}}, **engine)
    wanted = {job["name"]: reference(folder, job) for job in jobs}
    for suffix in ("", " again"):
        check(results, jobs, folder, model, suffix, lambda _, job: wanted[job["name"]])
    for job in jobs:  # the cache has one row per kept token, whatever it weighs
        got = results[job["name"] + " again"]
        assert got["cached"] == (wanted[job["name"]]["prompt"] - 1) // BLOCK * BLOCK
    half = len(jobs) // 2
    for merged, dropped in zip(jobs[:half], jobs[half:], strict=True):
        a, b = (results[job["name"]] for job in (merged, dropped))
        assert a["prompt"] == b["prompt"]
        assert max(abs(p - q) for p, q in zip(a["logprobs"], b["logprobs"], strict=True)) > 1e-2


def test_a_server_merges_unless_a_request_drops(tiny_folder: Any, tmp_path: Any) -> None:
    from support.serving import hf_reference

    folder, default = tiny_folder("qwen2_vl"), {"ratio": 0.5, "reducer": "kcenter", "merge": True}
    image, texts = http.image_url(3, 168, 140), []
    with started("vllm", folder, tmp_path, "--ratio", 0.5, "--merge", "on") as server:
        for asked in (None, {"merge": False}, {"merge": "auto", "ratio": 0.75}):
            answer = server.ask(image, tokencomp=asked)
            want, _, stats = hf_reference.chat_answer(
                folder, [image], http.QUESTION, {**default, **(asked or {})}
            )
            texts.append(answer.choices[0].message.content.rstrip("\ufffd"))
            assert texts[-1] == want.rstrip("\ufffd")
            merged = answer.usage.model_extra["tokencomp"]["merge"]
            assert merged is (stats.merged_from is not None)
    assert len(set(texts)) == 3


def test_the_switch_decides_what_requests_may_ask() -> None:
    off, on = ServerOptions.parse({"ratio": 0.5}), ServerOptions.parse({"merge": True})
    assert off.default.merge is False
    with pytest.raises(OptionError, match="vLLM without --merge"):
        off.resolve({"ratio": 0.5, "merge": True})
    for asked, merge in (({}, True), ({"merge": False}, False), ({"merge": "auto"}, "auto")):
        assert on.resolve({"ratio": 0.5, "reducer": "divprune", **asked}).merge is merge
    keys = [repr(on.resolve({"ratio": 0.5, "merge": m}).describe()) for m in (True, False, "auto")]
    assert len(set(keys)) == 3  # caches of media keep them apart
    for modality, ratio, merge in (
        ("image", 0.9, True),
        ("image", 0.95, False),
        ("video", 0.95, True),
    ):
        spec = on.resolve({"ratio": ratio, "merge": "auto"})
        assert ItemPlan.make([item_span(modality, (1, 8, 8))], spec).merge is merge


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("attention_config", "backend", AttentionBackendEnum.FLASHINFER, "FLASHINFER"),
        ("attention_config", "backend", AttentionBackendEnum.TRITON_ATTN, "TRITON_ATTN"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context"),
        ("parallel_config", "enable_dbo", True, "dual batch"),
        ("", "kv_transfer_config", SimpleNamespace(kv_connector="LMCacheConnectorV1"), "LMCache"),
        ("", "kv_transfer_config", SimpleNamespace(kv_connector="MoRIIOConnector"), "MoRIIO"),
        ("", "speculative_config", object(), "speculative"),
    ],
)
def test_engine_settings_that_cannot_merge_are_refused(
    part: str, name: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VllmConfig()
    config.model_config = SimpleNamespace(multimodal_config=None)
    monkeypatch.setenv("TOKENCOMP_ALLOW_UNTESTED", "1")
    checks.check_engine(config, offsets=False, merging=True)
    object.__setattr__(getattr(config, part) if part else config, name, value)
    for v2 in ("0", "1") if hasattr(config, "use_v2_model_runner") else ("1",):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", v2)
        with pytest.raises(UnsupportedModelError, match=words):
            checks.check_engine(config, offsets=False, merging=True)


def plain_layer(**changes: Any) -> Attention:
    """Return a layer of vLLM without a backend, with other attributes than usual."""
    layer = Attention.__new__(Attention)
    nn.Module.__init__(layer)
    usual = dict(
        head_size=64, kv_cache_torch_dtype=torch.float32, kv_cache_dtype="auto", has_sink=False,
        attn_type="decoder", kv_sharing_target_layer_name=None, impl=SimpleNamespace(),
    )  # fmt: skip
    for name, value in {**usual, **changes}.items():
        setattr(layer, name, value)
    return layer


def test_layers_that_cannot_merge_are_refused() -> None:
    weighted.check_layer(plain_layer())
    other = type("MLAAttention", (Attention,), {})
    mla = plain_layer()
    mla.__class__ = other
    for layer, words in (
        (mla, "MLAAttention has no keys"),
        (plain_layer(kv_cache_torch_dtype=torch.uint8, kv_cache_dtype="fp8"), "KV cache of fp8"),
        (plain_layer(head_size=256), "heads of 256"),
        (plain_layer(has_sink=True), "sinks"),
        (plain_layer(impl=SimpleNamespace(logits_soft_cap=30.0)), "capped"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            weighted.check_layer(layer)


def test_hybrid_models_are_refused_at_the_start(tiny_folder: Any) -> None:
    folder = str(tiny_folder("qwen3_5"))
    launch.check_architecture(folder, ServerOptions.parse({"ratio": 0.5}))
    with pytest.raises(OptionError, match="--merge on with Qwen3_5"):
        launch.check_architecture(folder, ServerOptions.parse({"ratio": 0.5, "merge": True}))


def test_wider_heads_are_part_of_the_compile_key() -> None:
    narrow, wide = VllmConfig(), VllmConfig()
    key = getattr(VllmConfig, "compute_hash", None) or VllmConfig.compile_factors  # from 0.34 on
    assert key(narrow) == key(wide)
    weighted.note_in_compile_key(wide)
    assert key(narrow) != key(wide)


class Embedding:
    """What the stock model does with the rows of media."""

    language_model = SimpleNamespace(config=SimpleNamespace(hidden_size=4))
    config = SimpleNamespace(image_token_id=7, video_token_id=8)

    def embed_input_ids(self, input_ids: Any, rows: Any, *, is_multimodal: Any) -> Any:
        assert all(x.shape[1] == 4 for x in rows or ())
        return rows


@pytest.mark.parametrize("offsets", [False, True])
def test_sizes_reach_the_buffer_of_the_step(offsets: bool) -> None:
    """Under model runner V2 positions are corrected before, and the sizes stay until here."""
    base = mrope.MRopeModel if offsets else CompressingModel
    model: Any = base.__new__(type("Tiny", (base, Embedding), {}))
    buffer = model._row_sizes = torch.full((9,), 5.0)
    torch.manual_seed(0)
    span = item_span("image", (1, 3, 4))
    spec = Method("uniform", 0.75, merge=True)
    plan = ItemPlan.from_tensor(ItemPlan.make([span], spec).to_tensor())
    rows, index = reduce_rows(plan, torch.rand(12, 4), 4, count_nonfinite)
    sizes = rows[:, 4:] @ torch.tensor([256.0, 1.0])
    assert sizes.sum() == 12 and sizes.max() > 1
    if offsets:
        model.config = SimpleNamespace(**vars(Embedding.config), vision_config=SimpleNamespace())
        rows = model.finish_item(plan, rows, index, {}, 0)
        ids, before = torch.tensor([1, 7, 7, 7, 1]), torch.zeros(3, 5, dtype=torch.long)
        (rows,), after, _ = model.recompute_mrope_positions(ids, [rows], before, 0)
        assert after[:, 1:4].tolist() == [[0] * 3, (index // 4).tolist(), (index % 4).tolist()]
    mask = torch.tensor([False, True, True, True, False, False])
    model.embed_input_ids(torch.zeros(6), [rows], is_multimodal=mask)
    assert buffer.tolist() == [1, *sizes.tolist(), 1, 1, 1, 1, 1]
    large = torch.tensor([[0, 0, 0, 0, 1, 45]]).bfloat16()  # beyond the integers of bfloat16
    media = [torch.zeros(2, 4).bfloat16(), large]
    model.embed_input_ids(torch.zeros(3), media, is_multimodal=torch.ones(3).bool())
    assert buffer[:4].tolist() == [1, 1, 301, 1]
    model.embed_input_ids(torch.zeros(2), [], is_multimodal=torch.zeros(2).bool())
    assert buffer.tolist() == [1] * 9  # a step of decoded tokens alone
