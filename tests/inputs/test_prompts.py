"""Prompts of interleaved text and images."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image
from support.trained import tiny

from tokencomp import zoo
from tokencomp.errors import MediaError
from tokencomp.inputs.prompts import build_inputs, media_chat, takes_videos
from tokencomp.zoo.shapesqa.items import item

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


def test_frames_are_images_where_a_model_takes_no_videos():
    """Gemma 3's processor leaves videos out and says nothing."""
    _, processor = zoo.load("tiny-gemma3")
    row = [Image.new("RGB", (56, 56), "green"), [RED, BLUE, RED]]
    got = build_inputs(processor, [row], ["What?"])
    expected = build_inputs(processor, [[row[0], RED, BLUE, RED]], ["What?"])
    assert len(got["pixel_values"]) == 4 and got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        ([RED, RED.resize((28, 56))], r"2 frames of shapes \[\(56, 28, 3\), \(56, 56, 3\)\]"),
        ([RED, RED.convert("L")], r"2 frames of shapes \[\(56, 56\), \(56, 56, 3\)\]"),
        ([], "0 frames .* one or more"),
    ],
)
def test_frames_that_make_no_video_are_one_message(clip, said):
    _, processor = zoo.load("tiny-qwen2-vl")
    with pytest.raises(MediaError, match=said):
        build_inputs(processor, [[clip]], ["What?"])


def test_a_video_has_a_place_in_the_prompts_of_models_that_take_one():
    taken = {name: takes_videos(zoo.load(name)[1]) for name in zoo.available_models()}
    assert [name for name, takes in taken.items() if not takes] == ["tiny-gemma3"]


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
