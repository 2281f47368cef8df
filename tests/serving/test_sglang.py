"""The SGLang plugin with SGLang's own Python files on a CPU; no engine is run."""

from __future__ import annotations

import asyncio
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed", allow_module_level=True)
if importlib.util.find_spec("IPython") is None:  # SGLang imports it for notebooks
    for name in ("IPython", "IPython.display"):
        sys.modules[name] = stub = MagicMock(__path__=[])
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)

import torch
from sglang.srt.managers import mm_schedule, mm_utils
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from support.serving import cases, hf_reference
from support.serving.selectors import selector
from support.serving.sglang_stand_ins import embedded, processed

from tokencomp.errors import OptionError, UnsupportedModelError
from tokencomp.method import Method
from tokencomp.serving import sglang as plugin
from tokencomp.serving.item_plan import config_facts
from tokencomp.serving.sglang.embedding import Compressing, CorrectingPositions
from tokencomp.serving.sglang.processing import (
    MODELS,
    PLAN,
    around_processor,
    check_server,
    compress,
)
from tokencomp.trained.cards import model_card


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm_utils, "get_server_args", lambda: None)


MEDIA = [
    [cases.IMAGE], [cases.VIDEO], [cases.IMAGE, cases.OTHER],
    [cases.OTHER, cases.VIDEO, cases.IMAGE], [cases.OTHER, ["image", 3, 28, 28], cases.IMAGE],
]  # fmt: skip


def split(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


CASES = [("qwen2_vl", media, name) for media in MEDIA for name in ("divprune", "bipartite")]
CASES += [("qwen3_vl", media, "divprune") for media in MEDIA]
CASES += [("qwen2_vl", media, "uniform") for media in MEDIA]  # at a budget
CASES += [(name, MEDIA[3], "selector") for name in ("qwen2_vl", "qwen3_vl")]  # of features


@pytest.mark.parametrize(("name", "media", "reducer"), CASES)
@torch.no_grad()
def test_equals_the_patched_model(
    name: str, media: Any, reducer: str, tiny_folder: Any, tmp_path: Path
) -> None:
    """Rows and positions through SGLang's own code give the decoder the same first token."""
    folder = tiny_folder(name)
    model, _ = hf_reference.load(folder)
    amount: dict[str, Any] = {"ratio": 0.75}
    if reducer == "uniform":
        amount = {"budget": 12}
    options = selector(tmp_path, model_card(model)) if reducer == "selector" else {}
    more = {"reducer": reducer, "options": options, "tokens": 1}
    job = cases.job(name, media, **{"ratio": 0.75, **amount}, **more)
    with hf_reference.with_true_positions(folder, job):
        want = hf_reference.answer(folder, job)
    spec, facts = Method(reducer, **amount, options=options), config_facts(model.config, "")
    output = compress(processed(folder, job), spec, 2, facts)
    n = len(output.input_ids)
    assert n == want["prompt"] and output.mrope_positions.shape == (3, n)
    true = hf_reference.true_positions(folder, job)
    assert int(output.mrope_position_delta) == int(true.max()) + 1 - n
    results = []
    for size in (n, 7):  # whole, and in chunks that cut items
        mm_schedule.init_mm_embedding_cache(1 << 26)
        results.append(embedded(model, output, split(n, size)))
    (x, positions, deepstack), chunked = results
    # The tower may see other batches in chunks, so rows differ by rounding.
    torch.testing.assert_close(x, chunked[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(positions, chunked[1])
    if reducer != "bipartite":  # whose rows have positions of their own
        assert torch.equal(positions, true[:, want["kept"]])
    more = {}
    if deepstack is not None:
        torch.testing.assert_close(deepstack, chunked[2], atol=1e-5, rtol=1e-5)
        media_rows = deepstack.abs().sum(1) > 0
        levels = deepstack[media_rows].split(x.shape[1], dim=1)
        more = {"visual_pos_masks": media_rows[None], "deepstack_visual_embeds": list(levels)}
    decoder = model.model.language_model
    hidden = decoder(inputs_embeds=x[None], position_ids=positions[:, None], **more)[0]
    scores = torch.log_softmax(model.lm_head(hidden[0, -1]).float(), -1)
    assert int(scores.argmax()) == want["tokens"][0]
    assert abs(float(scores.max()) - want["logprobs"][0]) < 1e-4


@torch.no_grad()
def test_hashes_keep_ratios_apart_and_ratio_zero_is_stock(tiny_folder: Any) -> None:
    folder = tiny_folder("qwen2_vl")
    job = cases.job("qwen2_vl", [cases.IMAGE, cases.OTHER], 0.5)
    stock = processed(folder, job)
    same = compress(processed(folder, job), Method("divprune", 0.0), 2)
    assert same.input_ids == stock.input_ids
    assert [i.hash for i in same.mm_items] == [i.hash for i in stock.mm_items]
    seen = [item.hash for item in stock.mm_items]
    for spec in (("divprune", 0.5), ("divprune", 0.75), ("uniform", 0.5)):
        output, again = (compress(processed(folder, job), Method(*spec), 2) for _ in "ab")
        assert [i.hash for i in output.mm_items] == [i.hash for i in again.mm_items]
        seen += [item.hash for item in output.mm_items]
        for item in output.mm_items:  # what the radix cache compares
            start, stop = item.offsets[0][0], item.offsets[0][1] + 1
            assert output.padded_input_ids[start:stop] == item.padding_sequence(stop - start)
        text = [t for t, s in zip(output.input_ids, output.padded_input_ids, strict=True) if t == s]
        pads = hf_reference.load(folder)[0].config.image_token_id
        assert text == [t for t in stock.input_ids if t != pads]
    assert len(set(seen)) == len(seen)


@torch.no_grad()
def test_hashes_know_what_the_trained_weights_are(tiny_folder: Any, tmp_path: Path) -> None:
    """Another training in the same folder gives other hashes, and an equal one the same."""
    folder = tiny_folder("qwen2_vl")
    model, _ = hf_reference.load(folder)
    job, facts = cases.job("qwen2_vl", [cases.IMAGE], 0.5), config_facts(model.config, "")
    hashes: list[str] = []
    for sign in (1, 1, -1):
        options = selector(tmp_path, model_card(model), sign, time=len(hashes))
        spec = Method("selector", 0.5, options=options)
        hashes.append(compress(processed(folder, job), spec, 2, facts).mm_items[0].hash)
    assert hashes[0] == hashes[1] != hashes[2]


@torch.no_grad()
def test_items_that_lose_nothing_and_shared_ones_are_stock(tiny_folder: Any) -> None:
    """SGLang's cache of processed images hands the same item to several requests."""
    job = cases.job("qwen2_vl", [cases.OTHER, ["image", 3, 28, 28]], 0.02)
    stock = processed(tiny_folder("qwen2_vl"), job)
    before = [(i.hash, list(i.offsets), set(i.model_specific_data)) for i in stock.mm_items]
    items = list(stock.mm_items)
    first, last = compress(stock, Method("uniform", 0.02), 2).mm_items
    assert [(i.hash, list(i.offsets), set(i.model_specific_data)) for i in items] == before
    assert last.hash == before[1][0] and PLAN not in last.model_specific_data
    removed = before[1][1][0][0] - last.offsets[0][0]
    full = first.model_specific_data["tokencomp_offsets"].shape[1]
    assert removed == full - (first.offsets[0][1] + 1 - first.offsets[0][0])


@torch.no_grad()
def test_uncompressed_items_and_levels_of_the_model(tiny_folder: Any) -> None:
    """Rows of a model with deepstack features keep its levels; rows without a plan get zeros."""
    model = SimpleNamespace(
        deepstack_visual_indexes=[3, 5],
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)),
        get_image_feature=lambda items: torch.cat([item.feature for item in items]),
    )  # fmt: skip
    tower = Compressing(model)
    grid = torch.tensor([[1, 8, 12]])
    rows = torch.randn(24, 3 * 16)
    output = MultimodalProcessorOutput(
        mm_items=[
            MultimodalDataItem(
                modality=Modality.IMAGE, feature=rows, offsets=[(2, 25)],
                model_specific_data={"image_grid_thw": grid},
            )
        ],
        input_ids=[1] * 30, mrope_position_delta=torch.tensor([[0]]),
        mrope_positions=hf_reference.grid_positions(
            [1, 1] + [9] * 24 + [1] * 4, [(1, 4, 6)], (9,), 1.0
        ),
    )  # fmt: skip
    (stock,) = output.mm_items
    (item,) = compress(output, Method("uniform", 0.5), 2).mm_items
    whole, reduced = tower.get_image_feature([stock, item])
    index = torch.tensor([(2 * i + 1) * 24 // 24 for i in range(12)])
    assert torch.equal(whole[:, :48], rows) and not whole[:, 48:].any()
    assert torch.equal(reduced[:, :48], rows[index])
    embeddings, deepstack = tower.separate_deepstack_embeds(reduced)
    assert torch.equal(embeddings, rows[index, :16])
    seen = {}

    def decoder(*args: Any, **kwargs: Any) -> None:
        seen.update(kwargs)

    positions = torch.full((3, 12), 2)
    CorrectingPositions(decoder, 2)(positions=positions, input_deepstack_embeds=deepstack)
    assert torch.equal(seen["input_deepstack_embeds"], rows[index, 16:])
    assert positions.T.tolist() == [[2, 2 + int(i) // 6, 2 + int(i) % 6] for i in index]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"precomputed_embeddings": torch.zeros(1)}, OptionError),
        ({"offsets": [(4, 5), (8, 9)]}, RuntimeError), ({"modality": Modality.AUDIO}, OptionError),
    ],
    ids=range(3),
)  # fmt: skip
def test_what_cannot_be_compressed_is_refused(changes: Any, error: Any, tiny_folder: Any) -> None:
    output = processed(tiny_folder("qwen2_vl"), cases.job("qwen2_vl", [cases.IMAGE], 0.5))
    for name, value in changes.items():
        setattr(output.mm_items[0], name, value)
    with pytest.raises(error):
        compress(output, Method("divprune", 0.5), 2)


def test_other_models_and_settings_of_the_server_are_refused() -> None:
    right = {"speculative_algorithm": None, "pp_size": 1}
    check_server(SimpleNamespace(architectures=[MODELS[0]]), SimpleNamespace(**right))
    for name, wrong in (
        (MODELS[0], {"speculative_algorithm": "EAGLE"}), (MODELS[0], {"pp_size": 2}),
        ("Other", {}), ("NVILAForConditionalGeneration", {}),
    ):  # fmt: skip
        with pytest.raises(UnsupportedModelError):
            settings = SimpleNamespace(**{**right, **wrong})
            check_server(SimpleNamespace(architectures=[name]), settings)


@torch.no_grad()
def test_a_request_chooses_and_errors_reach_the_client(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokencomp.serving.sglang import processing

    monkeypatch.setenv("TOKENCOMP_SERVING", '{"reducer": "uniform", "ratio": 0.5}')
    processing.server_options.cache_clear()
    folder, job = tiny_folder("qwen2_vl"), cases.job("qwen2_vl", [cases.IMAGE], 0.5)
    hf_config = hf_reference.load(folder)[0].config
    owner = SimpleNamespace(hf_config=hf_config, server_args=SimpleNamespace())

    async def original(*args: Any, **kwargs: Any) -> MultimodalProcessorOutput:
        return processed(folder, job)

    def ask(options: Any) -> int:
        request = SimpleNamespace(mm_processor_kwargs=options)
        output = asyncio.run(around_processor(original, owner, [b""], "", request))
        (item,) = output.mm_items
        return item.offsets[0][1] + 1 - item.offsets[0][0]

    full = ask({"tokencomp": {"ratio": 0}})
    assert ask(None) == ask({"max_pixels": 1}) == int(full / 2 + 0.5)
    assert ask({"tokencomp": {"ratio": 0.75}}) == int(full / 4 + 0.5)
    with pytest.raises(OptionError, match="fastv"):
        ask({"tokencomp": {"reducer": "fastv"}})
    with pytest.raises(OptionError, match="no stage in the vision tower"):
        ask({"tokencomp": {"tower_ratio": 0.3}})
    processing.server_options.cache_clear()


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.delenv("TOKENCOMP_SERVING", raising=False)
    plugin.register()
    assert not HookRegistry._hooks  # installed but unused
    monkeypatch.setenv("TOKENCOMP_SERVING", '{"reducer": "fastv", "ratio": 0.5}')
    with pytest.raises(SystemExit, match="fastv"):
        plugin.register()
    monkeypatch.setenv("TOKENCOMP_SERVING", '{"ratio": 0.5}')
    plugin.register()
    assert set(HookRegistry._hooks) == {plugin.PROCESSOR, *plugin.ROUTINES}
    monkeypatch.setattr(sglang, "__version__", "0.4.0", raising=False)
    with pytest.raises(SystemExit, match=r"0\.4\.0"):
        plugin.register()
    assert PLAN.startswith("tokencomp")
