"""Tests of the VILA processor: prompts, images and videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.family import vila_folder

from tokencomp.errors import MediaError, OptionError
from tokencomp.models import VilaProcessor


def processor(tmp_path: Path, **root: object) -> VilaProcessor:
    """Processor of a new folder whose root config has the entries `root`."""
    return VilaProcessor.from_pretrained(vila_folder.write(tmp_path / "m", **root))


def flat(color: int, size: tuple[int, int] = (28, 28)) -> Image.Image:
    return Image.new("RGB", size, (color, color, color))


def test_chat_template(tmp_path: Path) -> None:
    vila = processor(tmp_path)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": flat(0)}, {"type": "text", "text": "\nWhat?"}],
        },
        {"role": "assistant", "content": "Black."},
        {"role": "user", "content": "Sure?"},
    ]
    text = vila.apply_chat_template(messages)
    assert text.endswith("USER: <image>\nWhat? ASSISTANT: Black.</s> USER: Sure? ASSISTANT:")
    inputs = vila.apply_chat_template(messages, tokenize=True)
    assert (inputs["input_ids"] == vila.config.image_token_id).sum() == 16
    batch = vila.apply_chat_template([messages, messages[2:]], tokenize=True)
    assert batch["input_ids"].shape[0] == 2
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    with pytest.raises(MediaError, match="'audio'"):
        vila.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])
    bare = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]
    assert "<vila/video>?" in vila.apply_chat_template(bare)
    with pytest.raises(MediaError, match="medium 0"):
        vila.apply_chat_template(bare, tokenize=True)


def test_options_have_an_effect_or_are_refused(tmp_path: Path) -> None:
    vila = processor(tmp_path)
    video = np.zeros((10, 28, 28, 3), np.uint8)
    content = [{"type": "video", "video": video}, {"type": "text", "text": "?"}]
    chat = [{"role": "user", "content": content}]
    harmless = {"padding": True, "padding_side": "left", "return_tensors": "pt", "max_length": None}
    for limit in (2, 4):
        inputs = vila.apply_chat_template(
            chat, tokenize=True, num_frames=limit, return_dict=True, **harmless
        )
        assert inputs["video_frames"].tolist() == [limit]
        same = vila("<vila/video>?", videos=[video], num_frames=limit, **harmless)
        assert same["video_frames"].tolist() == [limit]
    for name, value in {
        "padding_side": "right", "truncation": True, "max_length": 8, "return_tensors": "np",
        "return_dict": False, "continue_final_message": True, "fps": 2, "chat_template": "x",
    }.items():  # fmt: skip
        with pytest.raises(OptionError, match=name):
            vila.apply_chat_template(chat, tokenize=True, **{name: value})
        with pytest.raises(OptionError, match=name):
            vila("hi", **{name: value})


def test_evenly_spaced_frames(tmp_path: Path) -> None:
    vila = processor(tmp_path)
    video = np.stack([np.full((28, 28, 3), 10 * i, np.uint8) for i in range(10)])
    inputs = vila("<vila/video>", videos=[video])
    assert inputs["video_frames"].tolist() == [4]
    shades = ((inputs["pixel_values_videos"].mean((1, 2, 3)) + 1) * 127.5).round().tolist()
    assert shades == [0, 30, 60, 90]
    assert vila("<vila/video>", videos=[video], num_frames=2)["video_frames"].tolist() == [2]
    assert vila("<vila/video>", videos=[video[:3]])["video_frames"].tolist() == [3]


def test_tiles(tmp_path: Path) -> None:
    """A 2:1 image becomes two tiles and a thumbnail, each on its own line of the prompt."""
    vila = processor(tmp_path, image_aspect_ratio="dynamic", max_tiles=4)
    wide = Image.new("RGB", (56, 28), (0, 0, 0))
    wide.paste((255, 255, 255), (28, 0, 56, 28))
    inputs = vila("<image>?", images=wide)
    means = inputs["pixel_values"].mean((1, 2, 3))
    torch.testing.assert_close(means[:2], torch.tensor([-1.0, 1.0]), atol=0.1, rtol=0)
    assert len(means) == 3
    image, newline = vila.config.image_token_id, vila.tokenizer("\n").input_ids
    ids = inputs["input_ids"][0].tolist()
    assert ids == ([image] * 16 + newline * 2) * 3 + vila.tokenizer("?").input_ids
    two = vila("<image><image>", images=[wide, wide])  # only a single image is tiled
    assert len(two["pixel_values"]) == 2


def test_pad(tmp_path: Path) -> None:
    vila = processor(tmp_path, image_aspect_ratio="pad")
    pixels = vila("<image>", images=flat(255, (28, 14)))["pixel_values"][0]
    rows = pixels.mean((0, 2))
    assert rows[14] > 0.9  # the picture
    assert abs(rows[0]) < 0.1  # borders in the mean colour
    assert abs(rows[-1]) < 0.1


def test_numbers_of_placeholders_and_media_must_agree(tmp_path: Path) -> None:
    vila = processor(tmp_path)
    for prompts, images, videos, message in (
        (["a", "<image><image>"], 1, 0, "prompt 1 has 2 <image>"),
        (["<image>"], 2, 0, "2 images for 1 <image>"),
        (["<vila/video>"], 0, 0, "prompt 0 has 1 <vila/video>"),
        (["x"], 0, 1, "1 videos for 0"),
    ):
        with pytest.raises(MediaError, match=message):
            vila(prompts, images=[flat(0)] * images, videos=[[flat(0)]] * videos)


def test_bad_media(tmp_path: Path) -> None:
    vila = processor(tmp_path)
    with pytest.raises(MediaError, match="video 0, frame 1: size 14×28"):
        vila("<vila/video>", videos=[[flat(0), flat(0, (14, 28))]])
    with pytest.raises(MediaError, match="video 0: no frames"):
        vila("<vila/video>", videos=[[]])
    with pytest.raises(MediaError, match="prompt 0, image 0"):
        vila("<image>", images=[np.zeros((4, 4), np.uint8)])
    with pytest.raises(MediaError, match=r"none\.png"):
        vila("<image>", images=[tmp_path / "none.png"])
