"""Attention windows and image blocks under FlashAttention and FlexAttention on a CPU.

FlexAttention measures windows in columns of the uncompressed prompt, as SDPA does. FlashAttention
counts rows, and knows no blocks: it is exact against itself, or refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import backends, kinds, oracle, plans, ways
from support.backends import FLASH, FLEX
from support.families import EOS, PAD, VOCAB, Family, text
from support.family import hybrid
from support.family.hybrid import HYBRID, Gemma3
from support.family.llava import Llava
from torch import Tensor, nn

import tokencomp
from tokencomp.errors import UnsupportedModelError

WINDOW = 12
STEPS = 6


class Windowed(Llava):
    """LLaVA on Mistral, all of whose layers have a window."""

    def config(self) -> Any:
        config = super().config()
        config.text_config = transformers.MistralConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD, sliding_window=WINDOW,
        )  # fmt: skip
        return config


class OpenGemma3(Gemma3):
    """Gemma 3 whose windows hold the whole prompt."""

    def config(self) -> Any:
        config = super().config()
        config.text_config.sliding_window = 200
        return config


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.install(monkeypatch, FLASH)


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.install(monkeypatch, FLEX)


@pytest.mark.parametrize("name", ["both", "attention"])
def test_flex_measures_windows_in_columns(flex: None, name: str) -> None:
    """A ragged batch, and more tokens than the window holds."""
    family = Windowed()
    model, inputs = backends.build(family, FLEX), ways.ragged(family)
    width = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle:
        out = oracle.generate(model, inputs, STEPS)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    assert width > 2 * WINDOW
    expected = kinds.expected_logits(
        family.build(), family, inputs, masks, out.sequences[:, width:-1]
    )
    assert (torch.stack(out.logits, 1) - expected[:, width - 1 :]).abs().max() < 2e-5


def test_flash_counts_windows_in_rows(flash: None) -> None:
    """So it is refused in original positions, and equals SDPA in compact ones."""
    family = Windowed()
    model, inputs = backends.build(family, FLASH), ways.ragged(family)
    with tokencomp.patch(model, 0.5), pytest.raises(UnsupportedModelError, match="in rows"):
        model(**inputs)
    found = []
    for own in (model, family.build()):
        with tokencomp.patch(own, 0.5, reducer="uniform", positions="compact"):
            found.append(torch.stack(oracle.generate(own, inputs, STEPS).logits))
    assert (found[0] - found[1]).abs().max() < 2e-5


def later_turn(model: nn.Module, family: Family, inputs: dict[str, Tensor]) -> Any:
    """Cache and positions behind the first turn, and the call of a second, of text alone."""
    where = family.positions(model, inputs)
    out = model(**inputs, position_ids=where, use_cache=True)
    new = torch.tensor([text(5, 20 + b) for b in range(len(where))])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    own = where[:, -1:] + 1 + torch.arange(5)
    turn = {"input_ids": new, "attention_mask": mask, "position_ids": own}
    turn["token_type_ids"] = torch.zeros_like(new)
    return {**turn, oracle.cache_name(out): oracle.cache_of(out)}


@pytest.mark.parametrize("name", ["both", "attention"])
def test_flash_on_gemma3_is_exact_against_itself(flash: None, name: str) -> None:
    """Against the masked run of plain causal layers: FlashAttention sees no blocks of images."""
    family = OpenGemma3()
    model, inputs = backends.build(family, FLASH), ways.ragged(family)
    width, plain = inputs["input_ids"].shape[1], family.build()
    every = [inputs["attention_mask"].bool()] * family.layers
    with torch.no_grad():
        causal = oracle.masked_logits(plain, family, inputs, every)[:, -1]
        assert (model(**inputs).logits[:, -1] - causal).abs().max() < 2e-5
        assert (plain(**inputs).logits[:2, -1] - causal[:2]).abs().max() > 1e-3
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        out = oracle.generate(model, inputs, STEPS)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        turn = later_turn(model, family, inputs)
        later = model(**turn).logits
    expected = oracle.masked_logits(plain, family, inputs, masks, out.sequences[:, width:-1])
    assert (torch.stack(out.logits, 1) - expected[:, width - 1 :]).abs().max() < 2e-5
    expected = oracle.masked_logits(plain, family, inputs, masks, turn["input_ids"])
    assert (later - expected[:, width:]).abs().max() < 2e-5


def test_flash_on_gemma3_with_compact_positions(flash: None) -> None:
    """Where a window binds, as the unpatched model on the kept embeddings alone."""
    family = HYBRID["gemma3"]
    model, embeds = backends.build(family, FLASH), []
    inputs = family.batch([[text(3), family.image(), text(12, 3), family.image(), text(5, 4)]])
    assert inputs["input_ids"].shape[1] > 2 * hybrid.WINDOW

    def note(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        embeds.append(kwargs["inputs_embeds"])

    with torch.no_grad():
        with tokencomp.patch(model, 0.5, reducer="uniform", positions="compact") as handle:
            found = model(**inputs).logits
            left = oracle.kept_columns(handle, inputs, family.layers)[-1][0]
        with family.decoder(model).register_forward_pre_hook(note, with_kwargs=True):
            model(**inputs)
        kept = {"attention_mask": inputs["attention_mask"][:, left]}
        kept["token_type_ids"] = inputs["token_type_ids"][:, left]
        expected = model(inputs_embeds=embeds[0][:, left], **kept).logits
    assert (found[:, left] - expected).abs().max() < 1e-5


def test_flex_shows_the_blocks_of_later_turns(flex: None) -> None:
    """A turn of several words behind a compressed Gemma 3 prompt, whose window binds."""
    found, family = [], HYBRID["gemma3"]
    for model in (backends.build(family, FLEX), family.build()):
        with tokencomp.patch(model, 0.5, reducer="uniform"), torch.no_grad():
            found.append(model(**later_turn(model, family, ways.ragged(family))).logits)
    assert (found[0] - found[1]).abs().max() < 2e-5
