"""A `sliding_window` without `layer_types`: Mistral applies it, Llama leaves it to the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import kinds, oracle, plans
from support.families import EOS, PAD, VOCAB, text
from support.family.llava import Llava

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.errors import RowIndexedAttentionError, UnsupportedModelError


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
REDUCERS = pytest.mark.parametrize("reducer", [pytest.param(plans.RELEVANT, id="condiv"), "fastv"])


@TEXTS
@REDUCERS
def test_below_the_window_dropping_is_masking(text_config: type, reducer: Any) -> None:
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


@pytest.mark.parametrize("cached", [True, False])
def test_a_window_that_no_layer_reads_is_refused(cached: bool) -> None:
    """The default cache of Llama cuts its rows to it, which the full-length run does not see."""
    family = Windowed(transformers.LlamaConfig, 20)
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)]])
    handle = tokencomp.patch(model, 0.5)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="sliding_window=20"):
        model(**inputs, use_cache=cached)
    with torch.no_grad(), handle.disabled():
        model(**inputs, use_cache=cached)


def test_generation_beyond_a_window_that_no_layer_reads_is_refused() -> None:
    family = Windowed(transformers.LlamaConfig, 28)
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)]])
    assert inputs["input_ids"].shape[1] < 28
    tokencomp.patch(model, 0.5)
    oracle.generate(model, inputs, 2)
    with pytest.raises(UnsupportedModelError, match="has 28 tokens"):
        oracle.generate(model, inputs, 8)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_window_of_columns(backend: str) -> None:
    """Beyond the window of Mistral, dropping is masking in the windowed full-length run."""
    family = Windowed(transformers.MistralConfig, 12)
    model, steps = family.build(backend), 14
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(9)]])
    width = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle, torch.no_grad():
        out = oracle.generate(model, inputs, steps)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        with handle.disabled():
            plain = model(**inputs, use_cache=False).logits[0, -1]
    expected = kinds.expected_logits(model, family, inputs, masks, out.sequences[:, width:-1])
    logits = torch.stack(out.logits, 1)
    torch.testing.assert_close(logits, expected[:, width - 1 :], atol=2e-5, rtol=1e-5)
    assert (logits[0, 0] - plain).abs().max() > 1e-2


def test_a_decoder_derived_elsewhere_has_the_window_of_its_base() -> None:
    """As FSDP2 derives one; the module of its class does not import the factory of masks."""
    family = Windowed(transformers.MistralConfig, 12)
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(9)]])
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        expected, kept = model(**inputs).logits, handle.stats.kept(0)
    decoder = family.decoder(model)
    decoder.__class__ = type("Derived", (type(decoder),), {"__module__": __name__})
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        found = model(**inputs).logits
        assert handle.stats.kept(0) == kept
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


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


def test_queries_that_are_scaled_by_row_are_refused() -> None:
    """As layers without positions do in long prompts of Llama 4."""
    family = Windowed(transformers.MistralConfig, 200)
    model = family.build()
    inputs = family.batch([[text(3), family.image(), text(5, 2)]])
    length = inputs["input_ids"].shape[1]
    config = model.config.text_config
    config.attn_temperature_tuning, config.floor_scale = True, length + 1
    with torch.no_grad(), tokencomp.patch(model, 0.5):
        model(**inputs)
    config.floor_scale = length
    message = "scale queries by the number of their"
    with tokencomp.patch(model, 0.5), pytest.raises(RowIndexedAttentionError, match=message):
        model(**inputs)


class Chunked(Llava):
    """LLaVA on the text model of Llama 4: three layers of four see chunks of eight tokens."""

    def config(self) -> Any:
        config = super().config()
        config.text_config = transformers.Llama4TextConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=8,
            attn_temperature_tuning=False, bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        return config


def test_chunks_begin_at_the_first_token_of_every_sample() -> None:
    """Behind padding that is no multiple of a chunk."""
    family = Chunked()
    model, steps = family.build(), 10
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(2), family.image()]])
    width = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle, torch.no_grad():
        out = oracle.generate(model, inputs, steps)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    expected = kinds.expected_logits(model, family, inputs, masks, out.sequences[:, width:-1])
    logits = torch.stack(out.logits, 1)
    torch.testing.assert_close(logits, expected[:, width - 1 :], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_weights_in_a_window(backend: str, between: bool) -> None:
    """The last rows of a cache have their own weights, also in a second turn."""
    family = Windowed(transformers.MistralConfig, 12)
    model, steps = family.build(backend), 14
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(9)]])
    width, kcenter = inputs["input_ids"].shape[1], make_reducer("kcenter")
    stages = [Stage(0, 0.5, kcenter, merge=True)]
    stages += [Stage(2, 0.2, kcenter, merge=True)] * between
    with tokencomp.patch(model, plan=Plan(tuple(stages))) as handle, torch.no_grad():
        out = oracle.generate(model, inputs, steps)
        masks = oracle.kept_columns(handle, inputs, family.layers)
        first = model(**inputs, use_cache=True)
        more = {"input_ids": out.sequences[:, width : width + 5]}
        more["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
        later = model(**more, past_key_values=oracle.cache_of(first)).logits
    merged, new = oracle.Merged(handle), out.sequences[:, width:-1]
    expected = kinds.expected_logits(model, family, inputs, masks, new, merged)
    plain = kinds.expected_logits(model, family, inputs, masks, new)
    assert merged.sizes.max() > 2
    logits = torch.stack(out.logits, 1)
    assert (logits - expected[:, width - 1 :]).abs().max() < 2e-5
    assert (later - expected[:, width : width + 5]).abs().max() < 2e-5
    assert (logits[0, 0] - plain[0, width - 1]).abs().max() > 1e-3
