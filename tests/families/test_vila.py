"""VILA folders: processor, projector, features, generating and saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.family import vila_folder
from support.family.vila_folder import projector_state
from torch import Tensor
from torch.nn import functional as F

from tokencomp.errors import CheckpointError, MediaError, OptionError, SpanError
from tokencomp.models import (
    VilaForConditionalGeneration,
    VilaProcessor,
    VilaProjector,
)
from tokencomp.models.vila.projector import tokens_per_side


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vila_folder.write(tmp_path_factory.mktemp("vila"))


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    torch.manual_seed(seed)
    return Image.fromarray(torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8).numpy())


def load(folder: Path) -> tuple[VilaForConditionalGeneration, VilaProcessor]:
    return VilaForConditionalGeneration.from_pretrained(folder), VilaProcessor.from_pretrained(
        folder
    )


def encode(model: VilaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Features (16, 64) of one image from the stock tower and the tested projector."""
    states = model.vision_tower(pixels[None], output_hidden_states=True).hidden_states
    return model.mm_projector(states[-2])[0]


@torch.no_grad()
def test_features_replace_placeholders(folder: Path) -> None:
    """Embeddings equal features and rows of the embedding table, joined token by token."""
    model, processor = load(folder)
    prompts = ["a <image> b <image>", "<vila/video>what?", "no picture"]
    images, frames = [picture(1), picture(2)], [picture(i) for i in range(3, 6)]
    inputs = processor(prompts, images=images, videos=[frames])
    tokenizer, table = processor.tokenizer, model.llm.model.embed_tokens.weight
    newline = tokenizer("\n").input_ids
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<image>", "<vila/video>"])
    stills = iter(inputs["pixel_values"])
    for b, prompt in enumerate(prompts):
        expected: list[Tensor] = []
        for token in tokenizer(prompt).input_ids:
            if token == image_id:
                expected += [encode(model, next(stills)), table[newline]]
            elif token == video_id:
                for pixels in inputs["pixel_values_videos"]:
                    expected += [encode(model, pixels), table[newline]]
            else:
                expected.append(table[[token]])
        row = torch.cat(expected)
        length = int(inputs["attention_mask"][b].sum())
        assert length == len(row)
        assert inputs["attention_mask"][b, -length:].all()  # left padding
        media = {k: inputs[k] for k in ("pixel_values", "pixel_values_videos", "video_frames")}
        embeds = model.embed(inputs["input_ids"], **media)
        torch.testing.assert_close(embeds[b, -length:], row, atol=1e-5, rtol=1e-5)
        direct = model.llm(inputs_embeds=row[None]).logits[0, -1]
        logits = model(**inputs).logits[b, -1]
        torch.testing.assert_close(logits, direct, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("llm", ["qwen2", "llama"])
def test_batch_equals_single_prompts(tmp_path: Path, llm: str) -> None:
    model, processor = load(vila_folder.write(tmp_path / "m", llm=llm))
    prompts = ["<image><image>compare", "<vila/video>", "<image>short"]
    images, video = [picture(i) for i in range(3)], [picture(i) for i in range(5, 9)]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    batch = model.generate(**processor(prompts, images=images, videos=[video]), **options)
    media = [(images[:2], None), (None, [video]), (images[2:], None)]
    for row, prompt, (stills, clips) in zip(batch, prompts, media, strict=True):
        single = model.generate(**processor(prompt, images=stills, videos=clips), **options)
        assert row[-6:].tolist() == single[0, -6:].tolist()


def test_beam_search_repeats_the_media_of_a_sample_together(folder: Path) -> None:
    model, processor = load(folder)
    prompts, images = ["<image>a<image>b", "<vila/video>c<image>"], [picture(i) for i in range(3)]
    video, options = [picture(i) for i in range(5, 8)], dict(num_beams=3, max_new_tokens=4)
    batch = model.generate(**processor(prompts, images=images, videos=[video]), **options)
    one = model.generate(**processor(prompts[0], images=images[:2]), **options)
    two = model.generate(**processor(prompts[1], images=images[2:], videos=[video]), **options)
    assert batch[0, -4:].tolist() == one[0, -4:].tolist()
    assert batch[1, -4:].tolist() == two[0, -4:].tolist()


def files(folder: Path) -> dict[str, object]:
    """Contents of all weight and JSON files of a folder, by relative path."""
    contents: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            contents[name] = {k: v.tolist() for k, v in load_file(path).items()}
        elif path.suffix == ".json":
            contents[name] = json.loads(path.read_text())
    return contents


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    model, processor = load(folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before, after = files(folder), files(tmp_path)
    assert set(before) <= set(after)
    for name in ("config.json", "mm_projector/config.json", *before):
        if name.endswith(".safetensors") or name in ("config.json", "mm_projector/config.json"):
            assert after[name] == before[name], name
    again, other = load(tmp_path)
    inputs, same = (p("<image>hi", images=picture(0)) for p in (processor, other))
    assert torch.equal(inputs["input_ids"], same["input_ids"])
    assert torch.equal(model(**inputs).logits, again(**same).logits)


def test_pooled_video(tmp_path: Path) -> None:
    """NVILA's temporal and spatial pooling averages blocks of 2×2×2 tokens."""
    spec = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[2, 2, 2]]}
    model, processor = load(vila_folder.write(tmp_path / "m", video_encoder=json.dumps(spec)))
    frames = [picture(i) for i in range(4)]
    inputs = processor("<vila/video>", videos=[frames])
    with torch.no_grad():
        x = torch.stack([encode(model, p) for p in inputs["pixel_values_videos"]]).view(4, 4, 4, -1)
        pooled = model.encode_videos(inputs["pixel_values_videos"], [4]).view(2, 2, 2, -1)
    for t in range(2):
        for r in range(2):
            for c in range(2):
                block = x[2 * t : 2 * t + 2, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
                torch.testing.assert_close(
                    pooled[t, r, c], block.mean((0, 1, 2)), atol=1e-5, rtol=0
                )
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 8
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize(
    "setting",
    [
        {"dynamic_s2": True},
        {"mm_use_im_start_end": True},
        {"mm_vision_select_feature": "patch"},
        {"image_aspect_ratio": "anyres"},
        {"video_encoder": {"_target_": "x.Q"}},
    ],
    ids=str,
)
def test_settings_with_other_features_are_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    folder = vila_folder.write(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(CheckpointError):
        VilaForConditionalGeneration.from_pretrained(folder)


def test_media_tokens_can_be_added(tmp_path: Path) -> None:
    """Checkpoints older than NVILA get ids past the end of the embedding table."""
    folder = vila_folder.write(tmp_path / "m", media=False)
    model = VilaForConditionalGeneration.from_pretrained(folder)
    processor = VilaProcessor.from_pretrained(folder)
    inputs = processor("<image>hi", images=picture(0))
    assert model(**inputs).logits.isfinite().all()


def test_placeholders_and_features_differ(folder: Path) -> None:
    model, processor = load(folder)
    inputs = processor("<image>hi", images=picture(0))
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(SpanError, match="16 image placeholders for 32"):
        model(**inputs)
    with pytest.raises(SpanError, match="no pixel_values"):
        model(inputs["input_ids"])


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
    for name, value in {"padding_side": "right", "truncation": True, "fps": 2}.items():
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
        (["a", "<image><image>"], 1, 0, "1 images for 2 <image>"),
        (["<image>"], 2, 0, "2 images for 1 <image>"),
        (["<vila/video>"], 0, 0, "0 videos for 1 <vila/video>"),
        (["x"], 0, 1, "1 videos for 0"),
    ):
        with pytest.raises(MediaError, match=message):
            vila(prompts, images=[flat(0)] * images, videos=[[flat(0)]] * videos)


VISION, HIDDEN = 6, 10


def blocks(x: Tensor, factor: int, columns: bool) -> Tensor:
    """Apply space to depth one block at a time."""
    side = int(len(x) ** 0.5)
    small = (side + factor - 1) // factor
    out = {}
    for i in range(small):
        for j in range(small):
            parts = []
            for di in range(factor):
                for dj in range(factor):
                    r, c = i * factor + di, j * factor + dj
                    inside = r < side and c < side
                    parts.append(x[r * side + c] if inside else torch.zeros(x.shape[1]))
            out[i, j] = torch.cat(parts)
    order = [(i, j) for j in range(small) for i in range(small)] if columns else sorted(out)
    return torch.stack([out[at] for at in order])


def reference(kind: str, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Apply the projector layer by layer with the weights of a checkpoint."""

    def norm(x: Tensor, at: int) -> Tensor:
        weight = w[f"layers.{at}.weight"]
        return F.layer_norm(x, weight.shape, weight, w[f"layers.{at}.bias"])

    def linear(x: Tensor, at: int) -> Tensor:
        return x @ w[f"layers.{at}.weight"].T + w[f"layers.{at}.bias"]

    if kind == "mlp2x_gelu":
        return linear(F.gelu(linear(x, 0)), 2)
    if kind == "mlp_downsample_3x3_fix":
        x = F.gelu(linear(norm(blocks(x, 3, False), 1), 2))
        return linear(F.gelu(linear(norm(x, 4), 5)), 7)
    x = norm(blocks(x, 2, kind == "mlp_downsample"), 1)
    return linear(F.gelu(linear(x, 2)), 4)


@pytest.mark.parametrize(
    "kind", ["mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix", "mlp2x_gelu"]
)
def test_reference(kind: str) -> None:
    state = projector_state(kind, VISION, HIDDEN)
    projector = VilaProjector(kind, VISION, HIDDEN)
    projector.load_state_dict(state)
    for side in (1, 4, 6, 7, 8):
        x = torch.randn(3, side * side, VISION)
        expected = torch.stack([reference(kind, state, image) for image in x])
        torch.testing.assert_close(projector(x), expected, atol=1e-5, rtol=1e-5)
        assert tokens_per_side(kind, side) ** 2 == expected.shape[1]
