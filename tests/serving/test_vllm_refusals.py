"""Settings that the plugin refuses, and its arithmetic, without a running engine."""

from __future__ import annotations

import contextlib
import itertools
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import numpy as np
import torch
import vllm
from cachetools import LRUCache
from support.serving.cases import SERVABLE
from vllm.config import CUDAGraphMode

from tokencomp.errors import OptionError, RatioError, UnsupportedModelError
from tokencomp.method import Method
from tokencomp.serving.item_plan import ItemPlan, ItemSize, field_name, item_span
from tokencomp.serving.item_rows import batches, reduce_rows
from tokencomp.serving.offsets import pack_offsets, split_text, unpack_offsets, with_text
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm import checks, entry, internvl, mrope
from tokencomp.serving.vllm.metrics import count_nonfinite, counters, item_sizes
from tokencomp.serving.vllm.model import CompressingModel
from tokencomp.serving.vllm.mrope import lengthen_tables
from tokencomp.serving.vllm.processing import CompressingProcessor
from tokencomp.serving.vllm.qwen3_vl import frame_offsets


def config(**changes: Any) -> Any:
    """Return the part of a VllmConfig that the checks read; `a__b=x` sets its attribute a.b."""
    result = SimpleNamespace(
        model_config=SimpleNamespace(
            multimodal_config=SimpleNamespace(video_pruning_rate=None, mm_encoder_tp_mode="weights")
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, tensor_parallel_size=1, use_ubatching=False
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        ec_transfer_config=None, kv_transfer_config=None, speculative_config=None,
        use_v2_model_runner=False,
    )  # fmt: skip
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = result
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, last, value)
    return result


WRONG = {
    "model_config__multimodal_config__video_pruning_rate": 0.5,
    "lora_config": object(),  # on a CPU, where these tests run
}
WRONG_FOR_OFFSETS = {
    "parallel_config__use_ubatching": True,
    "speculative_config": object(),  # V1's own defect, which the message names
}
UNTESTED = {
    "ec_transfer_config": SimpleNamespace(ec_connector="ECMooncakeConnector"),
    "kv_transfer_config": SimpleNamespace(kv_connector="MultiConnector"),
}
EVERY = {**WRONG, **WRONG_FOR_OFFSETS, **UNTESTED}


@pytest.mark.parametrize("name", EVERY)
def test_wrong_and_untested_settings_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = config(**{name: EVERY[name]})
    reason = "54498" if name == "speculative_config" else None
    with pytest.raises(UnsupportedModelError, match=reason):
        checks.check_engine(bad, offsets=True)
    monkeypatch.setenv("TOKENCOMP_ALLOW_UNTESTED", "1")
    if name in UNTESTED:  # the variable allows these only
        checks.check_engine(bad, offsets=True)
        return
    with pytest.raises(UnsupportedModelError):
        checks.check_engine(bad, offsets=True)


def test_other_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.32.4", "0.33.0", "0.34.1", "0.31.2", "0.35.0", "1.0", "0.320.0"):
        monkeypatch.setattr(vllm, "__version__", version)
        if version in ("0.32.4", "0.33.0", "0.34.1"):
            entry.check_version()
            continue
        with pytest.raises(UnsupportedModelError, match=version):
            entry.check_version()
    # Neither the processor nor the middleware would see the requests of such a front end.
    monkeypatch.setenv("TOKENCOMP_ALLOW_UNTESTED", "1")
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedModelError):
        checks.check_engine(config(), offsets=False)


def test_connectors_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL finds blocks by number, and only `tokencomp serve` compares prompts (see `roles`)."""
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in checks.EC_CONNECTORS:
        assert name in ECConnectorFactory._registry
        engine = config(ec_transfer_config=SimpleNamespace(ec_connector=name))
        checks.check_engine(engine, offsets=True)
    for name in checks.KV_CONNECTORS:
        assert name in KVConnectorFactory._registry
        engine = config(kv_transfer_config=SimpleNamespace(kv_connector=name))
        guarded = name in checks.BY_NUMBER
        with pytest.raises(UnsupportedModelError) if guarded else contextlib.nullcontext():
            checks.check_engine(engine, offsets=True)
        monkeypatch.setenv("TOKENCOMP_RULES", "{}")
        checks.check_engine(engine, offsets=True)
        monkeypatch.delenv("TOKENCOMP_RULES")


def test_pipelines_need_model_runner_v1() -> None:
    for offsets, merging, v2 in itertools.product((False, True), repeat=3):
        engine = config(
            parallel_config__pipeline_parallel_size=2, use_v2_model_runner=v2,
            parallel_config__prefill_context_parallel_size=1,
            attention_config=SimpleNamespace(backend=None),
        )  # fmt: skip
        refused = v2 and (offsets or merging)
        with pytest.raises(UnsupportedModelError) if refused else contextlib.nullcontext():
            checks.check_engine(engine, offsets=offsets, merging=merging)


def test_what_model_runner_and_positions_need() -> None:
    """V2 corrects positions before the forward pass: graphs stay full, drafters see no columns."""
    full = (CUDAGraphMode.FULL, CUDAGraphMode.FULL_AND_PIECEWISE)
    for mode, offsets, v2 in itertools.product(full, (False, True), (False, True)):
        engine = config(compilation_config__cudagraph_mode=mode, use_v2_model_runner=v2)
        checks.check_engine(engine, offsets=offsets)
        piecewise = offsets and not v2
        wanted = CUDAGraphMode.PIECEWISE if piecewise else mode
        assert engine.compilation_config.cudagraph_mode is wanted
        for name, value in WRONG_FOR_OFFSETS.items():
            changed = config(use_v2_model_runner=v2, **{name: value})
            if piecewise:
                with pytest.raises(UnsupportedModelError):
                    checks.check_engine(changed, offsets=offsets)
            else:
                checks.check_engine(changed, offsets=offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offsets_survive_any_dtype(dtype: torch.dtype) -> None:
    offsets = torch.arange(65536).repeat(3, 1)
    offsets[1], offsets[2] = offsets[1].flip(0), (offsets[2] * 7) % 65536
    assert torch.equal(unpack_offsets(pack_offsets(offsets, dtype)), offsets)
    with pytest.raises(RuntimeError, match="16 bits"):
        pack_offsets(torch.tensor([[65536], [0], [0]]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_ids_survive_any_dtype(dtype: torch.dtype) -> None:
    """Text between frames that an encoder without embeddings of text hands to a decoder."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(0, 65536, (3, 5000), generator=generator)
    ids, text = torch.randint(0, 1 << 24, (2, 5000), generator=generator)[0], offsets[0] % 3 == 0
    offsets[:, text] = offsets[0, text]  # text has one position
    back, words, found = split_text(unpack_offsets(with_text(offsets, ids, text).to(dtype)))
    assert torch.equal(back, offsets) and torch.equal(found, text)
    assert torch.equal(words, torch.where(text, ids, 0))


@pytest.mark.parametrize("factor", [None, 4.0])
def test_longer_tables_keep_their_entries(factor: float | None) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

    with set_current_vllm_config(VllmConfig()):
        table = MRotaryEmbedding(
            16, 16, 64, 1e6, True, torch.float32, [2, 3, 3], positions_factor=1,
            scaling_factor=factor,
        )  # fmt: skip
    old = table.cos_sin_cache.clone()
    lengthen_tables(torch.nn.ModuleList([table]), 2000)
    new = table.cos_sin_cache
    assert new.shape == (2000, 16) and torch.equal(new[: len(old)], old)
    # Both halves are waves in the position, so every entry follows from the two before it.
    turn = 2 * (old[1, :8] / old[0, :8])
    for wave in new.split(8, dim=1):
        torch.testing.assert_close(wave[2:], turn * wave[1:-1] - wave[:-2], atol=5e-4, rtol=0)
    lengthen_tables(torch.nn.ModuleList([table]), 100)
    assert table.cos_sin_cache is new


def test_frames_with_text_between_them() -> None:
    want, media, at, h, w = [], [], 0, 2, 3
    for text in (3, 2, 4, 1):
        want += [[at + i] * 3 for i in range(text)]
        at, media = at + text, media + [False] * text
        if text > 1:
            want += [[at, at + b, at + c] for b in range(h) for c in range(w)]
            at, media = at + max(h, w), media + [True] * (h * w)
    assert frame_offsets(np.array(media), h, w).T.tolist() == want


@pytest.mark.parametrize(
    ("media", "positions", "taken"),
    [
        ([(10, 310)], 100, True),  # 100 + 300 beyond them = 4 × 100
        ([(10, 160), (10, 160), (50, 8)], 100, True), ([(10, 311)], 100, False),
        ([(10, 160), (10, 161)], 100, False), ([(10, 70_000)], 10**9, False),
    ],
)  # fmt: skip
def test_positions_beyond_the_tables_are_refused(media: Any, positions: int, taken: bool) -> None:
    """Thin images and videos with a false frame rate have few tokens but large positions."""
    text = SimpleNamespace(max_position_embeddings=positions)
    model = SimpleNamespace(max_model_len=100, hf_text_config=text)
    owner: Any = SimpleNamespace(info=SimpleNamespace(ctx=SimpleNamespace(model_config=model)))
    sizes = [ItemSize(1000, kept, far) for kept, far in media]
    with contextlib.nullcontext() if taken else pytest.raises(OptionError):
        mrope.MRopeProcessor.check_positions(owner, sizes)


def test_media_from_a_cache_are_counted_without_their_plan() -> None:
    """What is stored of an item has one size, however many frames it has."""
    plan = ItemPlan.make([item_span("video", (1, 2, 2))] * 500, Method("uniform", 0.5))
    place = SimpleNamespace(get_num_embeds=lambda: plan.kept)

    def result(key: str, item: Any) -> dict[str, Any]:
        fields = {"mm_hashes": key, "mm_kwargs": item, "mm_placeholders": place}
        return {name: {"video": [value]} for name, value in fields.items()}

    known: LRUCache[str, ItemSize] = LRUCache(2)
    new = {field_name("video"): SimpleNamespace(data=plan.to_tensor())}
    want = {"video": [(1000, ItemSize(full=2000, kept=1000, extent=0))]}
    assert item_sizes(result("a", new), known) == item_sizes(result("a", None), known) == want
    assert item_sizes(result("b", None), known) == {"video": [(1000, None)]}
    assert len(pickle.dumps([*known.items()])) < 500 < len(pickle.dumps(plan))


def test_vision_batches_are_limited_by_uncompressed_rows() -> None:
    """Items with other stages in the tower have calls of their own."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda high: int(torch.randint(1, high, (1,), generator=generator))  # noqa: E731
    for _ in range(200):
        sizes, budget = [draw(60) for _ in range(draw(12))], draw(100)
        runs = list(batches(sizes, budget))
        assert [i for first, stop in runs for i in range(first, stop)] == list(range(len(sizes)))
        for first, stop in runs:
            assert stop - first == 1 or sum(sizes[first:stop]) <= budget
    towers = [None, None, (0.5, "kcenter", "{}"), (0.5, "kcenter", "{}"), (0.4, "random", "{}")]
    assert list(batches([1] * 5, 100, towers)) == [(0, 2), (2, 4), (4, 5)]
    assert list(batches([3] * 5, 3, towers)) == [(i, i + 1) for i in range(5)]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"mm_encoder_attn_backend": "FLASHINFER"}, CompressingProcessor),
     ({"mm_encoder_tp_mode": "data"}, CompressingProcessor), ({}, internvl.InternVLProcessor)],
)  # fmt: skip
def test_towers_that_cannot_be_shortened(settings: Any, kind: type) -> None:
    multimodal = SimpleNamespace(**settings)
    context = SimpleNamespace(model_config=SimpleNamespace(multimodal_config=multimodal))
    processor = object.__new__(kind)
    processor.info = SimpleNamespace(ctx=context)
    processor._check_tower(Method("uniform", 0.5))
    with pytest.raises(OptionError):
        processor._check_tower(Method("uniform", 0.5, tower_ratio=0.4))


def test_an_encoder_gets_pictures_one_by_one() -> None:
    multimodal = SimpleNamespace(mm_encoder_only=True)
    context = SimpleNamespace(model_config=SimpleNamespace(multimodal_config=multimodal))
    processor = object.__new__(CompressingProcessor)
    processor.info = SimpleNamespace(ctx=context)
    for name in ("kcenter", "pixelprune"):
        processor._check_tower(Method(name, 0.5, tower_ratio=0.4 if name == "kcenter" else 0.0))
    with pytest.raises(OptionError, match="one by one"):
        processor._check_tower(Method("delta"))


def test_options_of_requests_are_never_mixed_up() -> None:
    processor = object.__new__(CompressingProcessor)
    processor._options = ServerOptions()
    processor._latest = "", processor._options.default
    own = {"ratio": 0.5}
    first = processor._spec({"tokencomp": own})
    assert first.ratio == 0.5 and processor._spec({"tokencomp": {"ratio": 0.5}}) == first
    own["ratio"] = 0.25  # a client in Python may change its object
    assert processor._spec({"tokencomp": own}).ratio == 0.25
    assert processor._spec({}) is processor._spec({"tokencomp": None}) is processor._options.default
    assert processor._spec({"tokencomp": first}) is first
    deep: Any = []
    for _ in range(10**5):
        deep = [deep]
    for wrong in ({"ratio": 2}, {1: 2, "a": 3}, {"ratio": {1}}, object(), {"options": deep}):
        with pytest.raises((OptionError, RatioError)):
            processor._spec({"tokencomp": wrong})


OVERFLOWS = {"one value": (2, 1), "one row": (3, slice(None)), "all": (slice(None),) * 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", OVERFLOWS)
def test_features_that_overflowed_do_not_end_the_engine(where: str, value: float) -> None:
    """An item keeps evenly spaced tokens, as many as planned, and all values become finite."""
    before = counters()["nonfinite"]._value.get()
    for name in SERVABLE:
        method = Method(name, 0.75, merge=False)
        plan = ItemPlan.make([item_span("video", (3, 4, 5))], method, extent=5)
        x = torch.randn(60, 9)
        x[:, :6][OVERFLOWS[where]] = value
        rows, index = reduce_rows(plan, x, 6, count_nonfinite)
        assert index.tolist() == [int((i + 0.5) * 60 / plan.kept) for i in range(plan.kept)]
        assert torch.equal(rows, torch.where(torch.isfinite(x), x, torch.zeros(()))[index])
    assert counters()["nonfinite"]._value.get() == before + len(SERVABLE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_uncompressed_features_that_overflowed_do_not_spoil_other_answers(value: float) -> None:
    """They would stay in blocks of the KV cache."""
    tower = type("Tower", (), {"embed_multimodal": lambda self, features: features})
    model = object.__new__(type("Model", (CompressingModel, tower), {}))
    large = torch.full((2, 4, 5), torch.finfo(torch.float32).max)
    assert all(map(torch.equal, model.embed_multimodal(features=large), large))
    for nothing in ((), None):
        assert not len(model.embed_multimodal(features=nothing))
    for whole in (torch.randn(3, 4, 5), [torch.randn(4, 5), torch.randn(9, 5)]):
        before = counters()["nonfinite"]._value.get()
        assert all(map(torch.equal, model.embed_multimodal(features=whole), whole))
        assert counters()["nonfinite"]._value.get() == before
        whole[1][2, 3] = value
        expected = [rows.clone() for rows in whole]
        expected[1][2, 3] = 0
        rows = model.embed_multimodal(features=whole)
        assert all(map(torch.equal, rows, expected)) and len(rows) == len(expected)
        assert counters()["nonfinite"]._value.get() == before + 1
