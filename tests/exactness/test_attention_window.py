"""A `sliding_window` without `layer_types`: exact below the window, refused beyond it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import oracle
from support.families import EOS, PAD, VOCAB, text
from support.family.llava import Llava

import tokencomp
from tokencomp.errors import UnsupportedModelError


class Windowed(Llava):
    """LLaVA on a text model whose config names a window."""

    def __init__(self, text_config: type, window: int) -> None:
        self.text_config, self.window = text_config, window

    def config(self) -> Any:
        config = super().config()
        config.text_config = self.text_config(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD, sliding_window=self.window,
        )  # fmt: skip
        return config


TEXTS = pytest.mark.parametrize(
    "text_config", [transformers.LlamaConfig, transformers.MistralConfig]
)
REDUCERS = pytest.mark.parametrize("reducer", ["condiv", "fastv"])


@TEXTS
@REDUCERS
def test_below_the_window_dropping_is_masking(text_config: type, reducer: str) -> None:
    """Prompt and generated tokens together; the model without the window is the oracle."""
    family = Windowed(text_config, 60)
    model, steps = family.build(), 5
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(9)]])
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle, torch.no_grad():
        out = oracle.generate(model, inputs, steps)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        assert handle.stats.ratio > 0.4
    n = inputs["input_ids"].shape[1]
    new = out.sequences[:, n:]
    model.config.text_config.sliding_window = None
    expected = oracle.masked_logits(model, family, inputs, masks, new)[:, n - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-5, rtol=1e-5)


@TEXTS
@pytest.mark.parametrize("cached", [True, False])
def test_a_prompt_beyond_the_window_is_refused(text_config: type, cached: bool) -> None:
    family = Windowed(text_config, 20)
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)]])
    handle = tokencomp.patch(model, 0.5)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="sliding_window=20"):
        model(**inputs, use_cache=cached)
    with torch.no_grad(), handle.disabled():
        model(**inputs, use_cache=cached)


@TEXTS
def test_generation_beyond_the_window_is_refused(text_config: type) -> None:
    family = Windowed(text_config, 28)
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)]])
    assert inputs["input_ids"].shape[1] < 28
    tokencomp.patch(model, 0.5)
    oracle.generate(model, inputs, 2)
    with pytest.raises(UnsupportedModelError, match="28 tokens"):
        oracle.generate(model, inputs, 8)


def test_compact_positions_count_kept_tokens() -> None:
    """The window is measured in the positions that the rotary embedding uses."""
    family = Windowed(transformers.MistralConfig, 20)
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)]])
    assert inputs["input_ids"].shape[1] > 20
    with torch.no_grad(), tokencomp.patch(model, 0.8, positions="compact") as handle:
        found = model(**inputs, use_cache=True).logits
        model.config.text_config.sliding_window = None
        expected = model(**inputs, use_cache=False).logits
        assert handle.stats.ratio > 0.7
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
