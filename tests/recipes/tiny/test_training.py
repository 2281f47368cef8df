"""Training: sequences equal real chats, pixels equal the HF processor, runs can be resumed."""

import numpy as np
import pytest
import torch

from recipes.packing import Packer, attention_mask
from recipes.tiny.batches import Source
from recipes.tiny.export import export
from recipes.tiny.families import FAMILIES, family
from recipes.tiny.recipes import Stage
from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer
from recipes.tiny.trainer import TinyTrainer
from tokencomp.models import register_auto_classes
from tokencomp.zoo.shapesqa.items import item

SHAPES = [
    ("attribute", (224, 224), 8),
    ("count", (280, 196), 8),
    ("order", (224, 224), 8),
    ("needle", (168, 224), 12),
]


def taken(family, name, index, **shape):
    """An item that the processor of the family takes; the test is skipped where it does not."""
    one = item("train", name, index, **shape)
    if one.kind not in family.kinds:
        pytest.skip(f"its processor takes no {one.kind}s")
    return one


class Setup:
    def __init__(self, name, folder):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        torch.manual_seed(0)
        register_auto_classes()
        self.family = family(name)
        self.family.write_tokenizer(folder / "tokenizer")
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        self.packer = Packer(self.tokenizer, self.family)
        made = self.family.build(self.tokenizer)
        self.folder = export(made, self.family, folder / name)
        self.model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
        self.model.eval()
        self.processor = AutoProcessor.from_pretrained(self.folder)
        self.made = made


PLAIN = ("tiny-qwen3-vl-hard", "tiny-vila")  # the default, and a decoder of another kind


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[pytest.mark.long] * (n not in PLAIN)) for n in sorted(FAMILIES)],
)
def setup(request, tmp_path_factory):
    return Setup(request.param, tmp_path_factory.mktemp(request.param))


def _inputs(setup, one, prompts, answers=()):
    """What a user gets from the processor for a chat about one item."""
    chat = []
    for number, prompt in enumerate(prompts):
        text = [{"type": "text", "text": prompt}]
        chat.append(
            {"role": "user", "content": ([{"type": one.kind}] if not number else []) + text}
        )
        if number < len(answers):
            said = [{"type": "text", "text": answers[number]}]
            chat.append({"role": "assistant", "content": said})
    text = setup.processor.apply_chat_template(chat, add_generation_prompt=True)
    media = {"images": [one.image()]} if one.kind == "image" else {"videos": [one.video()]}
    return setup.processor(text=[text], return_tensors="pt", **media)


@pytest.mark.thin(2)
@pytest.mark.parametrize(("name", "size", "frames"), SHAPES)
def test_pixels_equal_the_processor(setup, name, size, frames):
    one = taken(setup.family, name, 0, size=size, frames=frames)
    theirs = _inputs(setup, one, [one.question])
    ours = setup.family.pixels(torch.from_numpy(one.pixels())[None], one.kind)
    for key, value in ours.items():
        assert value.shape == theirs[key].shape, key
        assert torch.allclose(value.float(), theirs[key].float(), atol=1e-5), key


@pytest.mark.thin(4)
@pytest.mark.parametrize(("name", "size", "frames"), SHAPES)
def test_packed_questions_see_what_single_chats_see(setup, name, size, frames):
    """Logits at each answer in a pack == logits of the one-turn chat through the processor."""
    one = taken(setup.family, name, 1, size=size, frames=frames)
    pixels = torch.from_numpy(one.pixels())[None]
    prompts = [one.question, "How many objects are there?", "Is there a red circle?"]
    segments = [setup.packer.segment(one.kind, prompt, one.answer) for prompt in prompts]
    shape = tuple(pixels.shape[1:4])
    row = setup.packer.pack(one.kind, shape, segments, 900)
    hidden = _run(setup, row, pixels, one.kind)
    for number, prompt in enumerate(prompts):
        inputs = _inputs(setup, one, [prompt])
        with torch.no_grad():
            single = setup.model(**inputs).logits[0, -1]
        at = np.flatnonzero(row["which"] == number)[0]
        ours = setup.model.get_output_embeddings()(hidden[0, at])
        assert torch.allclose(ours, single, atol=2e-4), prompt
        answer = setup.tokenizer(one.answer, add_special_tokens=False)["input_ids"]
        assert row["labels"][at : at + len(answer)].tolist() == answer
        assert row["labels"][at + len(answer)] == setup.tokenizer.eos_token_id


def _run(setup, row, pixels, kind):
    positions = torch.from_numpy(row["positions"])[:, None]
    with torch.no_grad():
        inputs = {
            "input_ids": torch.from_numpy(row["ids"])[None],
            "attention_mask": attention_mask(torch.from_numpy(row["segment"])[None]),
            "position_ids": positions if len(positions) > 1 else positions[0],
            **setup.family.pixels(pixels, kind),
        }
        return setup.family.hidden(setup.model, inputs)


TINY = (
    Stage("vision", 3, ((1.0, Source("vision", "video", batch=2, size=(56, 56))),), 1e-3, 1e-3),
    Stage(
        "mixture",
        3,
        (
            (0.5, Source("questions", "image", batch=2, room=60, dialog=0.5)),
            (0.5, Source("questions", "video", batch=1, room=60)),
        ),
        1e-3,
        1e-3,
        end=0.1,
    ),
)


@pytest.mark.long
@pytest.mark.parametrize("cut", [2, 4])
def test_interrupted_and_resumed_run_ends_with_the_same_weights(tmp_path, cut):
    arch = family("tiny-qwen2-vl")
    write_tokenizer(tmp_path, arch.chat_template)
    tokenizer = load_tokenizer(tmp_path)

    def trainer(folder):
        return TinyTrainer(
            arch, tokenizer, TINY, tmp_path / folder, seed=3, workers=0, save_every=2
        )

    whole = trainer("whole")
    start = {k: v.clone() for k, v in whole.model.state_dict().items()}
    assert whole.run()
    assert not trainer("cut").run(stop_after=cut)
    resumed = trainer("cut")
    assert resumed.phase * 3 + resumed.step == cut
    assert resumed.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    moved = [k for k, v in whole.model.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) == len(start)  # every parameter was trained
