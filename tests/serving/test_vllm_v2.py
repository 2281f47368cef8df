"""Positions under vLLM's model runner V2: its own pruner and gathering, without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

import numpy as np
import torch
from support.serving.hf_reference import grid_positions
from torch import nn
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

from tokencomp.method import Method
from tokencomp.serving.item_plan import ItemPlan, field_name, item_span
from tokencomp.serving.item_rows import reduce_item
from tokencomp.serving.vllm import entry, register

IMAGE, VIDEO, START, END = 90, 91, 92, 93
WIDTH, LEVELS = 8, 1
QWEN2, QWEN2_5, QWEN3 = (f"Qwen{v}VLForConditionalGeneration" for v in ("2", "2_5_", "3"))
GLM = "Glm4vForConditionalGeneration"
MODELS = (QWEN2, QWEN2_5, QWEN3, GLM)
SECONDS = 0.75  # with 2 positions per second, frames of Qwen2.5-VL are 1.5 positions apart


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def build(architecture: str) -> Any:
    """Return the plugin's model without weights."""
    model = object.__new__(entry.compressing(architecture, "Model"))
    nn.Module.__init__(model)
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2.0)
    if architecture != QWEN2_5:
        del vision.tokens_per_second
    model.config = SimpleNamespace(
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END, vision_config=vision,
    )  # fmt: skip
    model.language_model = SimpleNamespace(
        config=SimpleNamespace(hidden_size=WIDTH),
        embed_input_ids=lambda ids: ids[:, None].expand(-1, WIDTH).to(torch.bfloat16),
    )
    model.visual_dim, model.multiscale_dim = WIDTH, LEVELS * WIDTH
    # A timestamp has as many tokens as the digits of its seconds.
    model._tokenizer = SimpleNamespace(encode=lambda text, **_: [1] * (len(text) - 10))
    return model


class Rope:
    """The storage of V2's `RopeState`: int32 positions of every request, and its delta."""

    def __init__(self, requests: int, length: int) -> None:
        self.positions = torch.zeros(requests, 3, length, dtype=torch.int32)
        self.prefill_delta = SimpleNamespace(np=np.zeros(requests, dtype=np.int32))

    def add(self, i: int, positions: torch.Tensor, delta: int) -> None:
        self.positions[i, :, : positions.shape[1]] = positions
        self.prefill_delta.np[i] = delta

    def read_prefill_positions(self, req_idx: int, length: int) -> torch.Tensor:
        return self.positions[req_idx, :, :length]

    def update_prefill_positions(self, req_idx: int, positions: torch.Tensor, delta: int) -> None:
        self.positions[req_idx, :, : positions.shape[1]].copy_(positions)
        self.prefill_delta.np[req_idx] = delta


class Prompt:
    """A prompt of texts and media: as the engine sees it, and its positions by brute force."""

    def __init__(self, model: Any, architecture: str, parts: list[Any], name: str) -> None:
        self.model, self.timed = model, architecture == QWEN2_5
        self.frames, self.spans = architecture in (QWEN3, GLM), architecture == GLM
        self.ids: list[int] = []  # of the compressed prompt
        self.features: list[Any] = []
        self.rows: list[torch.Tensor] = []  # what the engine stores for every item
        full: list[int] = []
        grids: list[tuple[int, int, int]] = []
        kept: list[int] = []
        for part in parts:
            if isinstance(part, int):
                kept += range(len(full), len(full) + part)
                full += [5] * part
                self.ids += [5] * part
                continue
            kind, grid, ratio = part
            item, columns = self.add(kind, grid, ratio, f"{name}-{len(self.features)}")
            kept += [len(full) + c for c in columns]
            full += item
            single = kind == "image" or not self.frames
            grids += [grid] if single else [(1, *grid[1:])] * grid[0]
        factor = 2 * SECONDS if self.timed else 1.0
        self.true = grid_positions(full, grids, (IMAGE, VIDEO), factor)[:, kept]
        self.delta = int(grid_positions([*full, 5], grids, (IMAGE, VIDEO), factor)[0, -1])
        self.delta -= len(self.ids)

    def add(self, kind: str, grid: Any, ratio: float, key: str) -> tuple[list[int], list[int]]:
        """Add an item; return its uncompressed ids and the columns that stay."""
        model, (t, h, w) = self.model, grid
        pad = IMAGE if kind == "image" or self.spans else VIDEO
        data = {f"{kind}_grid_thw": torch.tensor([t, 2 * h, 2 * w])}
        ids = [pad] * (t * h * w)
        if kind == "video" and self.timed:
            data["second_per_grid_ts"] = torch.tensor(SECONDS)
        if kind == "video" and self.spans:
            frames = [[START, *[pad] * (h * w), END, *[1] * (1 + i % 3)] for i in range(t)]
            ids = [2, *itertools.chain(*frames), 3]
        elif kind == "video" and self.frames:
            data["timestamps"] = [i / 2 for i in range(t)]
            ids = model._video_ids(data["timestamps"], [h * w] * t).tolist()
        rows, columns = torch.randn(t * h * w, model.row_width).bfloat16(), list(range(len(ids)))
        if ratio:
            frames = [item_span(kind, (1, h, w))] * t if self.spans else [item_span(kind, grid)]
            plan = ItemPlan.make(frames, Method("random", ratio), extent=1)
            data[field_name(kind)] = plan.to_tensor()
            rows, index = reduce_item(plan, rows)
            patches = [i for i, x in enumerate(ids) if x == pad]
            lost = set(patches) - {patches[i] for i in index.tolist()}
            columns = [c for c in columns if c not in lost]
            batch = {name: [value] for name, value in data.items()}
            rows = model.finish_item(plan, rows, index, batch, 0)
        embedded = None
        if not ratio or self.spans:  # text between frames stays text
            part = [ids[c] for c in columns]
            embedded = torch.tensor(part) == pad
        else:
            part = [pad] * len(columns)
        self.ids += part
        place = PlaceholderRange(len(self.ids) - len(columns), len(columns), embedded)
        fields = {name: SimpleNamespace(data=value) for name, value in data.items()}
        feature = SimpleNamespace(modality=kind, mm_position=place, data=fields, identifier=key)
        self.features.append(feature)
        self.rows.append(rows)
        return ids, columns


LONG = ("video", (300, 1, 2), 0.5)
PROMPTS = [
    [4, ("image", (1, 4, 6), 0.5), 3, ("video", (4, 3, 2), 0.75), 2],
    [("image", (1, 2, 8), 0.0), ("image", (1, 6, 2), 0.75), 5, ("video", (3, 2, 2), 0.0), 1],
    [2, ("image", (1, 3, 3), 0.5), 1, ("image", (1, 5, 7), 0.9)],  # media end the prompt
    [1, LONG, 3, ("image", (1, 4, 4), 0.5), 4],  # offsets beyond 8 bits
    [12],
]


def windows(lengths: list[int], seed: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield batches of (request, start, stop) until all prompts are prefilled.

    Sometimes a request goes back and runs a part of its prompt again.
    """
    chance = np.random.RandomState(seed)
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        batch = []
        for i in chance.permutation(len(lengths)):
            if chance.rand() < 0.2 and done[i] < lengths[i]:
                done[i] = int(chance.randint(done[i] + 1))
            stop = min(done[i] + int(chance.choice([1, 2, 7, 40, 400])), lengths[i])
            if stop > done[i] and chance.rand() < 0.8:
                batch.append((int(i), done[i], stop))
                done[i] = stop
        if batch:
            yield batch


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("architecture", MODELS)
def test_windows_of_several_requests_get_exact_positions(architecture: str, seed: int) -> None:
    from tokencomp.serving.vllm.runner_v2 import state_with_offsets

    torch.manual_seed(seed)
    model = build(architecture)
    prompts = [Prompt(model, architecture, parts, f"r{i}") for i, parts in enumerate(PROMPTS)]
    lengths = [len(p.ids) for p in prompts]
    cache = SimpleNamespace(
        mm_features={f"r{i}": p.features for i, p in enumerate(prompts)},
        encoder_outputs={
            f.identifier: rows for p in prompts for f, rows in zip(p.features, p.rows, strict=True)
        },
    )
    rope = Rope(len(prompts), max(lengths))

    class Base:
        """What V2's default state provides."""

        def __init__(self, *_: Any) -> None:
            self.rope_state, self.inputs_embeds_size = rope, WIDTH

        def add_request(self, index: int, prompt: Prompt) -> None:
            rope.add(index, *model.get_mrope_input_positions(prompt.ids, prompt.features))

    state = state_with_offsets(Base)(None, model, cache, None)
    pruner = state.mm_pruner
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int32)
    for i, p in enumerate(prompts):
        if seed == 0:  # another request had this index before
            state.add_request(i, prompts[i - 1])
            pruner.rope_state.read_prefill_positions(i, lengths[i])
        state.add_request(i, p)
        ids[i, : len(p.ids)] = torch.tensor(p.ids)

    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=ids))
    gatherer = SimpleNamespace(is_realtime=False, encoder_cache=cache)
    corrected = 0
    for batch in windows(lengths, seed):
        index, start, stop = (np.array(x) for x in zip(*batch, strict=True))
        names, scheduled = [f"r{i}" for i in index], stop - start
        fill = np.array([lengths[i] for i in index])
        embeds, _ = EncoderRunner.gather_mm_embeddings(
            gatherer, names, int(scheduled.sum()), scheduled,
            np.cumsum([0, *scheduled]), fill, start,
        )  # fmt: skip
        if not embeds:
            continue
        batched = SimpleNamespace(
            req_ids=names, idx_mapping_np=index, prefill_len_np=fill,
            num_computed_prefill_tokens_np=start, num_scheduled_tokens=scheduled,
        )  # fmt: skip
        plain = pruner.recompute(embeds, batched, states)
        for clean, drafted, x in zip(plain, pruner.strip(embeds), embeds, strict=True):
            assert torch.equal(clean, x[:, : model.row_width])
            assert torch.equal(drafted, x[:, :WIDTH])
            corrected += x.shape[1] > model.row_width
        for i, first, end in batch:
            assert torch.equal(rope.positions[i, :, first:end], prompts[i].true[:, first:end].int())
    assert corrected > len(PROMPTS)
    for i, p in enumerate(prompts):
        assert rope.prefill_delta.np[i] == p.delta, i
    assert int(prompts[3].true.max()) > 256


def test_the_class_of_the_state_is_vllms_choice_with_corrected_positions() -> None:
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

    model = build(QWEN2)
    model.language_model = nn.Module()
    for hybrid, base in ((False, DefaultModelState), (True, MambaHybridModelState)):
        config = SimpleNamespace(is_hybrid=hybrid, is_attention_free=False)
        compilation = SimpleNamespace(static_forward_context={})
        model._vllm_config = SimpleNamespace(model_config=config, compilation_config=compilation)
        chosen = model.get_model_state_cls()
        assert chosen.__mro__[1] is base
