"""Training on drawings: it can be resumed, and its sequences are the prompts of inference."""

from __future__ import annotations

from pathlib import Path

import torch
from support.photographs import Drawings, toy

from recipes.photographs.batches import Mixture, StampBatches
from recipes.photographs.items import items
from recipes.photographs.model import CELL, IMAGE, build_processor
from recipes.photographs.scenes import SIZE
from recipes.photographs.train import StampStage, StampTrainer
from tokencomp.inputs.prompts import build_inputs

RECIPE = (
    StampStage("names", 3, 2, 1e-3, tower_lr=1e-3),
    StampStage("questions", 3, 2, 1e-3, Mixture(True, 2, 1), 1e-3, end=0.1),
)


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    weights = []
    for name, stops in (("whole", (None,)), ("parts", (2, 2, None))):
        for stop in stops:
            model, tokenizer = toy()
            build_processor(tokenizer)
            maker = StampBatches(tokenizer, Drawings())
            last = model.model.vision_tower.encoder.stages[-1]
            trainer = StampTrainer(model, maker, [last], RECIPE, tmp_path / name, rank=2)
            assert trainer.run(stop) is (stop is None)
        weights.append(trainer.parameters)
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=0)
    assert any("lora_B" in n and t.abs().sum() > 0 for n, t in weights[0].items())


def test_training_sequences_are_the_prompts_of_inference() -> None:
    """Packed segment by segment, a question has the ids and positions of its own prompt."""
    _, tokenizer = toy()
    processor = build_processor(tokenizer)
    maker = StampBatches(tokenizer, Drawings())
    (one,) = items(Drawings(), "train", 1, ("place",))
    segment = maker.packer.segment("image", one.query.text, f" {one.answer}")
    prefix, _ = maker.packer.prefix("image", (1, SIZE, SIZE))
    row = maker.packer.pack("image", (1, SIZE, SIZE), [segment] * 2, len(prefix) + 60)
    prompt = build_inputs(processor, [[one.image()]], [one.query.text])["input_ids"][0].tolist()
    assert prompt.count(tokenizer.convert_tokens_to_ids(IMAGE)) == (SIZE // CELL) ** 2
    answered = prompt + tokenizer(f" {one.answer}")["input_ids"] + [tokenizer.eos_token_id]
    for number in (1, 2):
        seen = (row["segment"] == 0) | (row["segment"] == number)
        assert row["ids"][seen].tolist() == answered
        assert row["positions"][0][seen].tolist() == [*range(len(answered))]
