"""Training of the model that listens: resumable, and on the prompts of inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.sounds.batches import SHAPE, SoundBatches
from recipes.sounds.items import items
from recipes.sounds.model import (
    TOKENS,
    audio_tokens,
    build,
    build_tokenizer,
    load,
    save,
)
from tokencomp.inputs.prompts import build_inputs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_training_sequences_are_the_prompts_of_inference(tmp_path: Path, tokenizer: Any) -> None:
    """Segment by segment, ids and positions; and the same tokens, heard by the saved model."""
    torch.manual_seed(0)
    save(build(tokenizer), tokenizer, tmp_path)
    model, processor = load(tmp_path)
    maker = SoundBatches(processor)
    one = next(iter(items("train", 1)))
    segment = maker.packer.segment("audio", one.query.text, f" {one.answer}")
    prefix, _ = maker.packer.prefix("audio", SHAPE)
    row = maker.packer.pack("audio", SHAPE, [segment] * 2, len(prefix) + 60)
    inputs = build_inputs(processor, [one.example().source()], [one.query.text])
    prompt = inputs["input_ids"][0].tolist()
    assert prompt.count(model.config.audio_token_id) == TOKENS
    answered = prompt + tokenizer(f" {one.answer}")["input_ids"] + [tokenizer.eos_token_id]
    for number in (1, 2):
        seen = (row["segment"] == 0) | (row["segment"] == number)
        assert row["ids"][seen].tolist() == answered
        assert row["positions"][0][seen].tolist() == [*range(len(answered))]
    features = maker.features([one.clip])
    torch.testing.assert_close(features, inputs["input_features"])
    with torch.no_grad():
        spliced = model.get_input_embeddings()(inputs["input_ids"])
        at = inputs["input_ids"] == model.config.audio_token_id
        spliced[at] = audio_tokens(model, features)[0]
        ours = model.model.language_model(inputs_embeds=spliced).last_hidden_state
        stock = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
