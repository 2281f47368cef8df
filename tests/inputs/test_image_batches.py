"""Batches of images for processors that want them flat, and for those that want them per prompt."""

import pytest
import torch
from support.trained import tiny

from tokencomp.inputs.prompts import build_inputs
from tokencomp.zoo.shapesqa.items import item


@pytest.mark.parametrize("name", ["tiny-gemma3", "tiny-qwen2-vl"])
def test_a_batch_holds_what_its_rows_hold_alone(tmp_path, name):
    processor = tiny(tmp_path, name=name)[1]
    media = [[item("validation", "attribute", i).image()] for i in range(2)]
    prompts = ["What color is the small circle?", "What?"]
    both = build_inputs(processor, media, prompts)
    alone = [build_inputs(processor, [m], [p]) for m, p in zip(media, prompts, strict=True)]
    assert torch.equal(both["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))
    for row, one in enumerate(alone):
        length = one["input_ids"].shape[1]
        assert torch.equal(both["input_ids"][row, -length:], one["input_ids"][0])
        assert both["attention_mask"][row].sum() == length
