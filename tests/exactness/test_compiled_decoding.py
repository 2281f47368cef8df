"""Compiled decoding against the masked model: batches with padding, later turns, plans by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.caches import ENTRY, ragged, static_cache
from support.compiled import breaks, compiled, graphs, reset
from support.families import CORE, Family, text
from torch import Tensor
from transformers import DynamicCache

import tokencomp

pytestmark = pytest.mark.long
FAMILY_NAMES = [*CORE, "smolvlm", "fast_vlm", "glm4v", "kimi_k25"]
STEPS = 5


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


def test_a_padded_batch_on_a_static_cache(family: Family) -> None:
    model, inputs = family.build(), ragged(family)
    with tokencomp.patch(model, plan=ENTRY) as handle:
        options = {"cache_implementation": "static", "compile_config": compiled(model)}
        out = oracle.generate(model, inputs, STEPS, **options)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    assert graphs() == 1 and not breaks()
    new = out.sequences[:, -STEPS:-1]
    expected = oracle.masked_logits(model, family, inputs, masks, new)[:, -STEPS:]
    assert (torch.stack(out.logits, 1) - expected).abs().max() < 1e-5


def test_merged_tokens_on_a_static_cache(family: Family) -> None:
    """A compiled step knows nothing of weights: rows stand in the cache as often as they count."""
    if family.name == "kimi_k25":
        pytest.skip("torch has no float64 for its experts")
    model, inputs = family.build(), ragged(family)
    with tokencomp.patch(model, 0.6, reducer="kcenter", merge=True) as handle:
        options = {"cache_implementation": "static", "compile_config": compiled(model)}
        out = oracle.generate(model, inputs, STEPS, **options)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    assert graphs() == 1 and not breaks()
    merged, new = oracle.Merged(handle), out.sequences[:, -STEPS:-1]
    expected = oracle.masked_logits(model, family, inputs, masks, new, merged)[:, -STEPS:]
    assert (torch.stack(out.logits, 1) - expected).abs().max() < 1e-5


class Conversation:
    """Two turns with an image and the words behind each, as calls and as one prompt."""

    def __init__(self, family: Family, model: Any) -> None:
        torch.manual_seed(3)
        words, more = text(STEPS, 21), text(STEPS, 22)
        first = [text(3), family.image(0), text(5, 3)]
        second = [text(2, 9), family.image(1), text(4, 8)]
        self.whole = family.batch([[*first, words, *second, more]])
        self.positions = family.positions(model, self.whole)
        self.turns: list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]] = []
        at = 0
        for turn, later in ((family.batch([first]), words), (family.batch([second]), more)):
            prompt, calls = self._call(turn, at), []
            at += turn["input_ids"].shape[1]
            for word in later:  # nothing of a step changes its shape, so there is no mask
                positions = self.positions[..., at : at + 1]
                calls.append({"input_ids": torch.tensor([[word]]), "position_ids": positions})
                at += 1
            self.turns.append((prompt, calls))

    def _call(self, inputs: dict[str, Tensor], at: int) -> dict[str, Tensor]:
        stop = at + inputs["input_ids"].shape[1]
        mask = torch.ones(1, stop, dtype=torch.long)
        positions = self.positions[..., at:stop]
        return {**inputs, "attention_mask": mask, "position_ids": positions}


def test_words_behind_two_turns(family: Family) -> None:
    """One graph for each number of tokens that have left, which is known while it is compiled."""
    model = family.build()
    conversation = Conversation(family, model)
    length = conversation.whole["input_ids"].shape[1]
    cache, logits, kept = static_cache(model, length + 1), [], []
    with tokencomp.patch(model, plan=ENTRY) as handle, torch.no_grad():
        step = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        for prompt, words in conversation.turns:
            out = model(**prompt, past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1])
            prompt = {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])}
            kept += [oracle.kept_columns(handle, prompt, 1)[0]]
            for word in words:
                logits.append(step(**word, past_key_values=cache, use_cache=True).logits[:, -1])
            kept.append(torch.ones(1, STEPS, dtype=torch.bool))
    assert graphs() == 2 and not breaks()
    mask = torch.cat(kept, 1)
    assert mask.shape[1] == length and int((~kept[0]).sum()) and int((~kept[2]).sum())
    expected = oracle.masked_logits(model, family, conversation.whole, [mask] * family.layers)
    ends = [kept[0].shape[1] - 1 + i for i in range(STEPS + 1)]
    ends += [length - STEPS - 1 + i for i in range(STEPS + 1)]
    assert (torch.stack(logits, 1) - expected[:, ends]).abs().max() < 1e-5


@pytest.mark.parametrize("plan", ["attention", "vanish"])
def test_words_behind_a_plan_by_layer(family: Family, plan: str) -> None:
    """Layers hold different rows, and the masks of a padded batch differ by layer."""
    model, inputs = family.build(), ragged(family)
    n, cache = inputs["input_ids"].shape[1], DynamicCache()
    positions, mask = family.positions(model, inputs), inputs["attention_mask"]
    words = torch.tensor([text(STEPS, 30 + i) for i in range(3)])
    with tokencomp.patch(model, plan=plans.make(plan, family.layers)) as handle, torch.no_grad():
        call = {"past_key_values": cache, "use_cache": True}
        logits = [model(**inputs, position_ids=positions, **call).logits[:, -1]]
        masks = oracle.kept_columns(handle, inputs, family.layers)
        step = torch.compile(model, backend="eager", dynamic=True)
        last = positions.amax(-1, keepdim=True)
        last = last.amax(0, keepdim=True).expand(3, -1, -1) if family.mrope else last
        for i in range(STEPS):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            now = {"attention_mask": mask, "position_ids": last + 1 + i, **call}
            logits.append(step(input_ids=words[:, i : i + 1], **now).logits[:, -1])
    expected = oracle.masked_logits(model, family, inputs, masks, words)[:, n - 1 :]
    assert (torch.stack(logits, 1) - expected).abs().max() < 1e-5
