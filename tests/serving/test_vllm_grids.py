"""Media that reach prefill and decode as grid and hash, after an encoder in another process."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import torch
from support.serving import cases, http
from support.serving import media as tiny
from support.serving.processes import Served, started
from support.serving.transfer import (
    GIVEN,
    LONGEST,
    ROUTER,
    encoded,
    handed_on,
    post,
    prefilled,
    question,
    same,
)

import tokencomp
from tokencomp.errors import OptionError
from tokencomp.serving import item_plan

METADATA = ("image_grid_thw", "video_grid_thw", "timestamps")


# -- the processor --------------------------------------------------------------------------------


@pytest.fixture
def process(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Function that processes media, named "0", "1", …, as an engine after an encoder does."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.parse import parse_mm_uuids
    from vllm.multimodal.processing import ProcessorInputs
    from vllm.multimodal.processing.context import TimingContext
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    monkeypatch.setenv("TOKENCOMP_RULES", "{}")

    def run(
        model: str, prompt: str, data: Any, options: Any, reading: Any = (), **server: Any
    ) -> Any:
        overrides = {"tokencomp": {"ratio": 0.5, **server}}
        limits = {"image": 4, "video": 4}
        config = ModelConfig(
            str(tiny_folder(model)), dtype="float32", hf_overrides=overrides,
            limit_mm_per_prompt=limits,
        )  # fmt: skip
        config.multimodal_config.allow_missing_mm_embeddings = True
        config.multimodal_config.enable_mm_embeds = True
        found = MULTIMODAL_REGISTRY.create_processor(config)
        items = found.info.parse_mm_data(data)
        names = {m: list(map(str, range(n))) for m, n in items.get_all_counts().items()}
        inputs = ProcessorInputs(
            found.info.get_tokenizer().encode(prompt), items, parse_mm_uuids(names),
            hf_processor_mm_kwargs={"tokencomp": options}, media_io_kwargs=dict(reading),
        )  # fmt: skip
        return found.apply(inputs, TimingContext(enabled=False))

    return run


def media_of(job: dict[str, Any]) -> dict[str, Any]:
    media = tiny.media(job["media"])
    if "video" in media:
        media["video"] = [(v, tiny.metadata(len(v))) for v in media["video"]]
    return media


def grids_of(result: Any) -> dict[str, Any]:
    """What an encoder reports of its items."""
    grids: dict[str, Any] = {}
    for modality, items in result["mm_kwargs"].items():
        for name in METADATA:
            values = [torch.as_tensor(item[name].data) for item in items if name in item]
            if values:
                grids.setdefault(modality, {})[name] = torch.stack(values)
    return grids


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_a_grid_has_the_placeholders_and_the_hash_of_the_pixels(process: Any, model: str) -> None:
    media = [cases.IMAGE, cases.OTHER]
    media += [] if model == "qwen2_5_vl" else [cases.VIDEO]
    job, lengths, hashes = cases.job(model, media, 0), [], []
    for options in (
        {"ratio": 0}, {"ratio": 0.3}, {"ratio": 0.9, "reducer": "uniform"}, {"budget": 12},
        {"ratio": 0.9, "tower_ratio": 0.5},
    ):  # fmt: skip
        pixels = process(model, job["prompt"], media_of(job), options)
        grids = process(model, job["prompt"], grids_of(pixels), options)
        for name in ("prompt_token_ids", "mm_hashes", "mm_placeholders"):
            assert grids[name] == pixels[name], (options, name)
        lengths.append(len(grids["prompt_token_ids"]))
        hashes.append(json.dumps(grids["mm_hashes"]))
    assert len(set(hashes)) == 5 and len(set(lengths)) >= 4


def test_grids_that_decide_nothing_are_refused(
    process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept depends on pixels, positions on seconds, or nobody compares the hashes."""
    grid = {"image": {"image_grid_thw": torch.tensor([[1, 16, 22]])}}
    prompt = cases.job("qwen2_vl", [cases.IMAGE], 0)["prompt"]
    for name in ("delta", "pixelprune"):
        with pytest.raises(OptionError, match=f"{name}.*decides by pixels"):
            process("qwen2_vl", prompt, grid, {"reducer": name})
    rows = {"image_embeds": torch.zeros(88, 128), **grid["image"]}
    with pytest.raises(OptionError, match="precomputed"):
        process("qwen2_vl", prompt, {"image": rows}, {"ratio": 0.5})
    clip = {"video": {"video_grid_thw": torch.tensor([[4, 8, 6]])}}
    prompt = cases.job("qwen2_5_vl", [cases.VIDEO], 0)["prompt"]
    for ratio in (0, 0.5):
        with pytest.raises(OptionError, match="seconds"):
            process("qwen2_5_vl", prompt, clip, {"ratio": ratio})
    monkeypatch.delenv("TOKENCOMP_RULES")
    prompt = cases.job("qwen2_vl", [cases.IMAGE], 0)["prompt"]
    with pytest.raises(OptionError, match="tokencomp serve"):
        process("qwen2_vl", prompt, grid, {"ratio": 0.5})


def test_other_media_of_a_request_leave_the_hash_of_a_clip(process: Any) -> None:
    """The limit of pixels of a file is what the other media of the request leave."""
    job = cases.job("qwen2_vl", [cases.VIDEO], 0.5)
    one, other, third = (
        process("qwen2_vl", job["prompt"], media_of(job), {"ratio": 0.5}, {"video": reading})
        for reading in ({"pixels": 10**6}, {"pixels": 10**5}, {"pixels": 10**6, "frames": "all"})
    )
    assert one["mm_hashes"] == other["mm_hashes"] != third["mm_hashes"]


def test_hashes_differ_by_release_and_layout_of_rows(
    process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of uncompressed items, whose rows another process may lay out in another way."""
    job, hashes = cases.job("qwen2_vl", [cases.IMAGE], 0), []
    for version, merge, ratio in itertools.product(("1", "2"), (False, True), (0, 0.5)):
        for module in (tokencomp, item_plan):
            monkeypatch.setattr(module, "__version__", version)
        options, media = {"ratio": ratio, "merge": False}, media_of(job)
        hashes += [
            str(process("qwen2_vl", job["prompt"], media, options, merge=merge)["mm_hashes"])
            for _ in range(2)
        ]
    assert len(set(hashes)) == 8 and hashes[::2] == hashes[1::2]


# -- three servers --------------------------------------------------------------------------------

SMALL = ("--max-model-len", "640", "--num-gpu-blocks-override", "24")  # a KV cache of 768 tokens
LONG = 300


@contextlib.contextmanager
def roles(folder: Path, root: Path) -> Iterator[tuple[Served, Served, Served]]:
    """An encoder, a prefill and a decode."""
    ec = '{"ec_connector": "ECExampleConnector", "ec_role": "ec_%s", "ec_connector_extra_config": '
    ec += json.dumps({"shared_storage_path": str(root / "ec")}) + "}"
    kv = '{"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}'
    flags = {
        "encode": ["--ec-transfer-config", ec % "producer"],
        "prefill": ["--ec-transfer-config", ec % "consumer", "--kv-transfer-config", kv],
        "decode": [
            "--ec-transfer-config", ec % "consumer",
            "--kv-transfer-config", kv.replace("kv_both", "kv_consumer"), *SMALL,
        ],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        servers = []
        for name, transfer in flags.items():
            (root / name).mkdir()
            words = ["--ratio", "0.5", "--merge", "auto", "--"]
            words += ["--enforce-eager", "--dtype", "float32", "--block-size", "32", *transfer]
            port = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(http.free_port()), **ROUTER}
            servers.append(
                stack.enter_context(started("vllm", folder, root / name, *words, **port))
            )
        yield servers[0], servers[1], servers[2]


def encode(server: Served, body: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Encode the media of a request one by one; return the request with grids in their place."""
    parts, stored = [], {}
    for i, part in enumerate(body["messages"][0]["content"]):
        if part["type"] == "text":
            parts.append(part)
            continue
        name = f"{body['name']} {i}"
        asked = [{"role": "user", "content": [{**part, "uuid": name}]}]
        one = {k: v for k, v in body.items() if k in ("model", "tokencomp")}
        status, answer = post(server, {**one, "messages": asked, "max_tokens": 1, **more})
        assert status == 200, answer
        ((key, found),) = answer["ec_transfer_params"].items()
        kind = part["type"].replace("_url", "_embeds")
        parts.append({"type": kind, kind: found["metadata"], "uuid": name})
        stored[key] = found
    messages = [{"role": "user", "content": parts}]
    return {**body, "messages": messages, "ec_transfer_params": stored}


def plain(body: dict[str, Any]) -> dict[str, Any]:
    """A request as a client sends it."""
    return {k: v for k, v in body.items() if k != "name"}


def test_grids_answer_as_pixels_do(tiny_folder: Any, tmp_path: Path) -> None:
    """Images, and clips with text between their frames."""
    pytest.importorskip("nixl", reason="nixl is not installed (pip install nixl)")
    with roles(tiny_folder("qwen3_vl"), tmp_path) as (encoder, prefill, decode):
        asked = [{**question(n), "name": f"picture {n}"} for n in range(10)]
        grids = [plain(encode(encoder, body)) for body in asked]
        begun = encoded(prefill)
        answers = [post(prefill, body) for body in grids]
        for body in grids:
            answers.append(handed_on(prefill, decode, body))
        assert encoded(encoder) and not begun and not encoded(prefill) and not encoded(decode)
        for number, (status, got) in enumerate(answers):
            assert status == 200, got
            alone = post(prefill, plain(asked[number % 10]))[1]  # from pixels, encoded there
            assert same(alone, got), number
        assert encoded(prefill)
        check_refusals(encoder, prefill, decode)
        check_a_full_cache(encoder, prefill, decode)


def check_a_full_cache(encoder: Served, prefill: Served, decode: Served) -> None:
    """A decode that computes a prompt again has the rows of the encoder, and does not end.

    The first tokens are compared: those of 300 pass near ties of a random model.
    """
    for attempt in range(5):  # until the answers overlap enough; a busy machine spreads them
        asked = [{**question(n), "name": f"long {attempt} {n}"} for n in (1, 2, 5)]
        bodies = []
        for body in asked:
            grid = {**plain(encode(encoder, body)), "max_tokens": LONG}
            bodies.append({**grid, "kv_transfer_params": prefilled(prefill, grid)})
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda body: post(decode, body), bodies))
        if preempted := http.metric(decode.url, "vllm:num_preemptions_total"):
            break
    assert preempted and not encoded(decode)
    for body, (status, got) in zip(asked, answers, strict=True):
        assert status == 200, got
        content = got["choices"][0]["logprobs"]["content"]
        assert len(content) == LONG
        del content[LONGEST:]
        assert same(post(prefill, plain(body))[1], got)


def check_refusals(encoder: Served, prefill: Served, decode: Served) -> None:
    """Items whose rows are nowhere end in 400, and no engine ends."""
    body = {**question(21), "tokencomp": {"ratio": 0.75}, "name": "another"}
    grid = plain(encode(encoder, body))
    stored = grid["ec_transfer_params"]
    others = [{**grid, "tokencomp": other} for other in (
        {"ratio": 0.5}, {"ratio": 0}, {"ratio": 0.75, "reducer": "uniform"},
    )]  # fmt: skip
    others.append({k: v for k, v in grid.items() if k != "ec_transfer_params"})
    for wrong in others:
        for server, more in ((prefill, {}), (prefill, {"kv_transfer_params": GIVEN}), (decode, {})):
            status, answer = post(server, {**wrong, **more})
            assert status == 400 and "is not in ec_transfer" in answer["error"]["message"], answer
    handed = prefilled(prefill, grid)
    status, _ = post(decode, {**others[0], "kv_transfer_params": handed})
    assert status == 409
    for name in ("delta", "pixelprune"):
        status, answer = post(prefill, {**grid, "tokencomp": {"reducer": name}})
        assert status == 400 and "by pixels" in answer["error"]["message"]
    one = {**plain(body), "tokencomp": {"reducer": "delta"}}
    status, answer = post(encoder, {**one, "max_tokens": 1})
    assert status == 400 and "one by one" in answer["error"]["message"]
    handed = prefilled(prefill, {**grid, "ec_transfer_params": stored})
    status, got = post(decode, {**grid, "kv_transfer_params": handed})
    assert status == 200 and same(post(prefill, plain(body))[1], got)
