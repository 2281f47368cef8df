"""Tests of VILA folders: loading, inserting features, generating and saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.family import vila_folder
from torch import Tensor

from tokencomp.errors import CheckpointError, SpanError
from tokencomp.models import VilaForConditionalGeneration, VilaProcessor, register_auto_classes


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


def test_auto_classes(folder: Path) -> None:
    import transformers

    register_auto_classes()
    register_auto_classes()
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(model, VilaForConditionalGeneration)
    assert model.config.num_video_frames == 4
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, VilaProcessor)


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


def break_folder(folder: Path, what: str) -> None:
    """Damage one part of a folder, or set a key of its root config with ``key=json``."""
    import shutil

    root = json.loads((folder / "config.json").read_text())
    if what == "llm":
        shutil.rmtree(folder / what)
    elif what == "weights":
        (folder / "mm_projector" / "model.safetensors").unlink()
    elif what == "json":
        (folder / "config.json").write_text("{")
    elif what == "projector":
        (folder / "mm_projector" / "config.json").write_text('{"mm_projector_type": "magic"}')
    elif what == "shape":
        about = '{"mm_projector_type": "mlp_downsample_3x3_fix"}'
        (folder / "mm_projector" / "config.json").write_text(about)
    elif what == "tokenizer":
        vila_folder.tokenizer(media=False).save_pretrained(folder / "llm")
    else:
        key, value = what.split("=")
        root[key] = json.loads(value)
        (folder / "config.json").write_text(json.dumps(root))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("llm", "llm: missing sub-checkpoint"),
        ("weights", "mm_projector: no projector weights"),
        ("json", "not valid JSON"),
        ("projector", "'magic'"),
        ("shape", "do not fit"),
        ("tokenizer", "no media token <image>, <vila/video>"),
        ("dynamic_s2=true", "dynamic_s2"),
        ("mm_use_im_start_end=true", "start and end tokens"),
        ('mm_vision_select_feature="patch"', "'patch'"),
        ('image_aspect_ratio="anyres"', "'anyres'"),
        ('video_encoder={"_target_": "x.Q"}', "'Q'"),
    ],
)
def test_bad_folder(tmp_path: Path, what: str, message: str) -> None:
    folder = vila_folder.write(tmp_path / "m")
    break_folder(folder, what)
    with pytest.raises(CheckpointError, match=message):
        VilaForConditionalGeneration.from_pretrained(folder)


def test_media_tokens_can_be_added(tmp_path: Path) -> None:
    """Checkpoints older than NVILA get ids past the end of the embedding table."""
    folder = vila_folder.write(tmp_path / "m", media=False)
    model = VilaForConditionalGeneration.from_pretrained(folder, add_media_tokens=True)
    processor = VilaProcessor.from_pretrained(folder, add_media_tokens=True)
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


def test_ready_made_embeddings(folder: Path) -> None:
    model, processor = load(folder)
    inputs = processor("<image>hi", images=picture(0))
    expected = model(**inputs).logits
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    embeds = model.embed(ids, pixels)
    assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    with pytest.raises(SpanError, match="inputs_embeds together with pixel_values"):
        model(inputs_embeds=embeds, pixel_values=pixels)


def test_assisted_decoding(folder: Path) -> None:
    """The assistant model sees the media too, and the generated tokens do not change."""
    model, processor = load(folder)
    assistant, _ = load(folder)
    inputs = processor("<image>a", images=picture(0))
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected, seen = model.generate(**inputs, **options), []
    hook = assistant.vision_tower.register_forward_pre_hook(lambda *_: seen.append(1))
    assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), expected)
    hook.remove()
    assert len(seen) == 1
