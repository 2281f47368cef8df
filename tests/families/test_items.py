"""An item is what the user passed: tiles of an image, and frames of a clip, are one item.

Prompts are made by real processors; the oracle is the list of media that they got.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from support import oracle
from support.families import FAMILIES, text
from support.serving.models import BUILDERS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText as Auto

import tokencomp
from tokencomp.adapters.items import GAPS
from tokencomp.errors import RatioWarning
from tokencomp.inputs.prompts import build_inputs

SIDE = {"height": 32, "width": 32}
LONG, TILE = {"longest_edge": 128}, {"longest_edge": 32}
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% elif part['type'] == 'video' %}VIDEO\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def byte_tokenizer(special: list[str], **names: str) -> Any:
    """A tokenizer of bytes, whose decoded ids are the text again."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made = hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<pad>")
    for name, token in names.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", raw.token_to_id(token))
    return made


def internvl() -> tuple[Any, Any]:
    names = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    tokenizer = byte_tokenizer([*names.values()], **names)
    images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4)
    videos = hf.InternVLVideoProcessor(size=SIDE, do_sample_frames=False)
    template = TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>").replace("VIDEO", "<video>")
    processor = hf.InternVLProcessor(
        images, tokenizer, videos, image_seq_length=16, chat_template=template
    )
    return processor, "<IMG_CONTEXT>"


def idefics3(smol: bool = False) -> tuple[Any, Any]:
    places = [f"<row_{r}_col_{c}>" for r, c in itertools.product(range(1, 5), range(1, 5))]
    special = ["<fake_token_around_image>", "<image>", "<video>", "<global-img>", *places]
    tokenizer = byte_tokenizer([*special, "<end_of_utterance>"])
    template = TEMPLATE.replace("IMAGE", "<image>").replace("VIDEO", "<video>")
    kind = hf.SmolVLMImageProcessor if smol else hf.Idefics3ImageProcessor
    images = kind(size=LONG, max_image_size=TILE)
    parts = [images, tokenizer]
    if smol:
        parts.append(hf.SmolVLMVideoProcessor(size=TILE, max_image_size=TILE))
    made = hf.SmolVLMProcessor if smol else hf.Idefics3Processor
    return made(*parts, image_seq_len=16, chat_template=template), "<image>"


MADE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": functools.partial(idefics3, smol=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """Model and processor of a family, loaded from a folder."""

    @functools.cache
    def load(name: str) -> tuple[Any, Any]:
        folder = tmp_path_factory.mktemp(name)
        if name not in MADE:
            BUILDERS[name](folder)
            processor = hf.AutoProcessor.from_pretrained(folder)
            if name == "glm4v":
                marks = "<|begin_of_image|><|image|><|end_of_image|>"
                template = TEMPLATE.replace("IMAGE", marks)
                marks = "<|begin_of_video|><|video|><|end_of_video|>"
                processor.chat_template = template.replace("VIDEO", marks)
            return Auto.from_pretrained(folder, dtype="float32"), processor
        with pytest.MonkeyPatch.context() as patch:  # SmolVLM's processor writes numbers as words
            module = hf.models.smolvlm.processing_smolvlm
            patch.setattr(module, "num2words", str)
            processor, token = MADE[name]()
        processor.tokenizer.save_pretrained(folder)
        config = FAMILIES[name].config()
        config.text_config.vocab_size = 320
        config.image_token_id = processor.tokenizer.convert_tokens_to_ids(token)
        torch.manual_seed(0)
        FAMILIES[name].model_class()(config).save_pretrained(folder)
        return Auto.from_pretrained(folder).eval(), processor

    return load


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


def clip(frames: int) -> list[Image.Image]:
    return [picture(64, 64) for _ in range(frames)]


SMALL, WIDE, TALL = (60, 60), (128, 64), (64, 130)
ROWS: dict[str, list[list[Any]]] = {
    "one image": [[WIDE]],
    "three images": [[SMALL, WIDE, TALL]],
    "ragged": [[TALL, SMALL], [WIDE]],
    "clip": [[4]],
    "two clips": [[4, 4]],
    "mixed": [[WIDE, 4]],
}
UNABLE = [("smolvlm", "mixed"), ("glm4v", "mixed")]
FOLDERS = [*MADE, *(name for name in BUILDERS if name != "internvl")]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", FOLDERS)
def test_items_are_media(
    name: str, kind: str, folders: Callable[[str], tuple[Any, Any]], monkeypatch: Any
) -> None:
    """As many items as media, and no item keeps more than its budget."""
    monkeypatch.setattr(hf.models.smolvlm.processing_smolvlm, "num2words", str)
    model, processor = folders(name)
    media = [[clip(m) if isinstance(m, int) else picture(*m) for m in row] for row in ROWS[kind]]
    if (name in ("llava", "idefics3") and 4 in ROWS[kind][0]) or (name, kind) in UNABLE:
        pytest.skip("the processor takes no clips, or none next to an image")
    inputs = build_inputs(processor, media, ["What is it?"] * len(media))
    with torch.no_grad(), tokencomp.patch(model, reducer="uniform", budget=10) as handle:
        model(**inputs)
        stats = handle.stats
    for b, row in enumerate(media):
        kept: dict[int, tuple[int, int]] = {}
        for span, counts in zip(stats.spans[b], stats.counts[b], strict=True):
            whole, left = kept.get(span.item, (0, 0))
            kept[span.item] = whole + span.visual, left + counts[-1]
        assert len(kept) == len(row)
        special = any(span.special for span in stats.spans[b])  # line breaks are always kept
        assert special or all(left == min(10, whole) for whole, left in kept.values())


@pytest.mark.parametrize(("name", "kind"), [("smolvlm", "ragged"), ("internvl", "two clips")])
def test_dropping_equals_masking(
    name: str, kind: str, folders: Callable[[str], tuple[Any, Any]], monkeypatch: Any
) -> None:
    monkeypatch.setattr(hf.models.smolvlm.processing_smolvlm, "num2words", str)
    model, processor = folders(name)
    family = FAMILIES[name]
    media = [[clip(m) if isinstance(m, int) else picture(*m) for m in row] for row in ROWS[kind]]
    inputs = build_inputs(processor, media, ["What is it?"] * len(media))
    handle, out, masks = oracle.generated(model, family, inputs, 2, budget=21, reducer="kcenter")
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5
    assert sum(handle.stats.tokens_after[0]) < family.layers * handle.stats.tokens_before[0]


def test_frames_without_a_tokenizer_are_announced() -> None:
    family = FAMILIES["internvl"]
    inputs = family.batch([[text(3), family.video(3), text(4)]])
    model, warned = family.build(), pytest.warns(RatioWarning, match="per frame")
    with torch.no_grad(), tokencomp.patch(model, budget=5), warned:
        model(**inputs)


def written(name: str, grid: tuple[int, int]) -> str:
    """What the processor of a model type writes for an image of a grid of tiles."""
    module = importlib.import_module(f"transformers.models.{name}.processing_{name}")
    kind = getattr(module, module.__all__[0])
    rows, cols = grid
    words = dict(
        image_seq_len=2, image_seq_length=2, img_size=2, patch_size=1, image_token="<image>",
        img_patch_token="<image>", fake_image_token="<fake_token_around_image>",
        global_image_tag="<global-img>", start_of_img_token="<s>", end_of_img_token="<e>",
        tile_token="TILE", tile_global_token="TILE_GLOBAL", boi_token="<s>", eoi_token="<e>",
        img_line_break_token="<|IMG_LINE_BREAK|>", image_start_token="<s>", image_end_token="<e>",
        image_thumbnail_token="<|img_thumbnail|>",
    )  # fmt: skip
    fake = types.SimpleNamespace(**words)
    if name == "lfm2_vl":
        return kind._build_image_tokens(fake, rows, cols, 2, 3, True, True)
    tiles = rows * cols + 1
    sizes = dict(rows=[[rows]], cols=[[cols]], num_patches=[tiles], grids=torch.tensor([grid]))
    return kind.replace_image_token(fake, sizes, 0).replace("<IMG_ATOM>", "<image>")


STRUCTURAL = ("granite_docling", "aya_vision", "cohere2_vision", "lfm2_vl", "ovis2")


@pytest.mark.parametrize("name", [n for n in STRUCTURAL if hasattr(hf.models, n)])
def test_gaps_are_those_of_the_processor(name: str) -> None:
    """Of two adjacent images: all gaps but the one between them are inside an item."""
    image = written(name, (2, 3))
    gaps = [gap for gap in (image + image).split("<image>")[1:-1] if gap]
    inside = [bool(re.fullmatch(GAPS[name].tiles, gap)) for gap in gaps]
    assert len(gaps) == 13 and inside == [True] * 6 + [False] + [True] * 6
