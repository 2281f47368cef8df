"""Prompts of interleaved text and images."""

from __future__ import annotations

import itertools

import pytest
from PIL import Image

from tokencomp import zoo
from tokencomp.inputs.prompts import build_inputs, media_chat

RED, BLUE = (Image.new("RGB", (56, 56), colour) for colour in ("red", "blue"))


@pytest.mark.parametrize(
    ("prompt", "media", "said"),
    [
        ("What?", [RED], "[image]What?"),
        ("What?", [], "What?"),
        ("Which tag is <image>?", [], "Which tag is <image>?"),
        ("a<image>b<image>c", [RED, BLUE], "a[image]b[image]c"),
        ("<image><image>c", [RED, BLUE], "[image][image]c"),
        ("a<image>", [RED], "a[image]"),
        ("a<image>b", [RED, BLUE], "[image][image]ab"),
        ("a<image>b", [[RED, BLUE]], "[video]ab"),
    ],
)
def test_images_stand_at_their_marks(prompt, media, said):
    (message,) = media_chat(media, prompt)
    parts = [part.get("text", f"[{part['type']}]") for part in message["content"]]
    assert "".join(parts) == said and "" not in parts


def test_the_processor_sees_images_where_the_marks_are():
    """Red between two words, blue behind them: four tokens each, in this order."""
    _, processor = zoo.load("tiny-qwen2-vl")
    inputs = build_inputs(processor, [[RED, BLUE]], ["one <image> two <image> three"])
    text = processor.batch_decode(inputs["input_ids"])[0]
    places = [text.index(word) for word in ("one", "two", "three")]
    pads = [text.count("<|image_pad|>", *pair) for pair in itertools.pairwise(places)]
    assert pads == [4, 4] and "<image>" not in text
