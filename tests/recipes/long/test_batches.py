"""Training sequences of long answers equal real chats; labels of cells equal what is drawn."""

import numpy as np
import pytest
import torch

from recipes.long.batches import RATE, LongBatches, LongStage, Pictures
from recipes.long.cells import LATER, PARTS, token_labels
from recipes.long.train import PLANS, start
from recipes.packing import Packer, stacked
from recipes.trainer import text_inputs
from tokencomp import zoo
from tokencomp.inputs.prompts import build_inputs
from tokencomp.zoo.shapesqa.facts import PLACES
from tokencomp.zoo.shapesqa.lettering import WORDS
from tokencomp.zoo.shapesqa.long_scenes import FAMILIES, item
from tokencomp.zoo.shapesqa.scenes import COLORS, SHAPES

CELL = 28


@pytest.fixture(scope="module")
def loaded():
    return start()


@pytest.mark.parametrize("kind", FAMILIES)
def test_sequences_equal_what_users_get(loaded, kind):
    """Ids, M-RoPE positions and pixels of prompt and answer, for one and several pictures."""
    model, processor = loaded
    arch = Pictures()
    packer = Packer(processor.tokenizer, arch)
    for one in (item("train", kind, k) for k in range(2)):
        media, scene = one.media(), one.scenes[0]
        inputs = build_inputs(processor, [list(media)], [one.question])
        count = scene.frames if one.kind == "video" else len(one.scenes)
        shape = (count, scene.height, scene.width)
        segment = packer.segment(one.kind, one.question, one.answer)
        row = packer.pack(one.kind, shape, [segment], 2000, fps=RATE)
        n = inputs["input_ids"].shape[1]
        assert row["ids"][:n].tolist() == inputs["input_ids"][0].tolist()
        said = processor.tokenizer(one.answer, add_special_tokens=False)["input_ids"]
        assert row["labels"][n - 1 :][: len(said)].tolist() == said
        names = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids")
        grids = {name: inputs[name] for name in names if name in inputs}
        positions, _ = model.model.get_rope_index(inputs["input_ids"], **grids)
        assert (positions[:, 0].numpy() == row["positions"][:, :n]).all()
        frames = np.stack([np.asarray(x) for x in (media if one.kind == "image" else media[0])])
        frames = torch.as_tensor(frames)
        frames = frames[:, None] if one.kind == "image" else frames[None]
        (flat, _) = arch.pixels(frames, one.kind).values()
        assert torch.equal(flat, inputs.get("pixel_values", inputs.get("pixel_values_videos")))


def test_hidden_states_of_gemma3_equal_those_of_the_stock_forward_pass():
    """Windows of attention and pictures that see all of themselves, in a packed row of answers."""
    model, processor = start("tiny-gemma3")
    arch = PLANS["tiny-gemma3"].family
    packer = Packer(processor.tokenizer, arch)
    one = next(one for k in range(9) if (one := item("train", "describe", k)).scenes[0].width < 280)
    asked = [(one.question, one.answer), ("Count the red objects, step by step.", "so 0.")]
    segments = [packer.segment("image", *pair) for pair in asked]
    shape = (1, one.scenes[0].height, one.scenes[0].width)
    batch = stacked([packer.pack("image", shape, segments, 400)])
    media = [np.asarray(picture) for picture in one.media()]
    pixels = arch.pixels(torch.as_tensor(np.stack(media))[:, None], "image")
    with torch.no_grad():
        packed = arch.hidden(model, {**text_inputs(batch), **pixels})[0]
        for number, (question, answer) in enumerate(asked, 1):
            inputs = dict(build_inputs(processor, [list(one.media())], [question]))
            said = processor.tokenizer([answer], add_special_tokens=False, return_tensors="pt")
            for name, more in (("input_ids", said["input_ids"]), ("attention_mask", 1)):
                more = torch.as_tensor(more).expand(1, said["input_ids"].shape[1])
                inputs[name] = torch.cat([inputs[name], more], 1)
            rest = torch.zeros_like(said["input_ids"])
            inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"], rest], 1)
            stock = model.model(**inputs).last_hidden_state[0]
            (at,) = np.isin(batch["segment"][0], (0, number)).nonzero()
            at = at[: len(stock)]
            assert batch["ids"][0][at].tolist() == inputs["input_ids"][0].tolist()
            torch.testing.assert_close(packed[at], stock, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cell", [CELL, 35])  # Gemma 3 has 8 × 8 tokens for 280 px too
def test_cells_name_the_object_in_their_middle(cell):
    names, side = [*PARTS, *LATER], cell
    for one in (item("train", "compare", k) for k in range(6)):
        width = one.scenes[0].width // side
        labels = token_labels(one.scenes, side).reshape(2, width, width, len(names))
        for scene, shown in zip(one.scenes, labels, strict=True):
            for thing in scene.things:
                x, y = thing.center()
                cell = dict(zip(names, shown[int(y // side), int(x // side)], strict=True))
                row, column = int(y * 4 / scene.height), int(x * 3 / scene.width)
                if not thing.small:  # a neighbour may cover more of a small one's cell
                    assert COLORS[cell["color"] - 1] == thing.color
                    assert SHAPES[cell["shape"] - 1] == thing.shape
                    assert PLACES[cell["place"]] == PLACES[3 * row + column]


def test_events_are_labelled_in_their_second_alone():
    names = [*PARTS, *LATER]
    for one in (item("train", "follow", k) for k in range(3)):
        (scene,) = one.scenes
        side = scene.width // CELL
        labels = token_labels(one.scenes).reshape(scene.frames // 2, side, side, len(names))
        assert (labels[..., names.index("second")].max((1, 2)) == np.arange(len(labels))).all()
        color = labels[..., names.index("color")]
        lasting = {COLORS.index(t.color) + 1 for t in scene.things if not t.visible}
        for second in range(len(labels)):
            here = {COLORS.index(f.value.split()[3]) + 1 for f in one.facts if f.key == str(second)}
            assert {*np.unique(color[second][color[second] > 0])} <= here | lasting
            assert here <= {*np.unique(color[second])}


def test_words_are_labelled_with_the_word_before():
    names = [*PARTS, *LATER]
    for one in (item("train", "read", k) for k in range(4)):
        labels = token_labels(one.scenes)
        found = {}
        for row in labels[labels[:, names.index("word")] > 0]:
            before = row[names.index("previous")]
            word = WORDS[row[names.index("word")] - 1]
            found[word] = WORDS[before - 1] if before else ""
        said = one.answer.split()
        follows = dict(zip(said, ["", *said], strict=False))
        assert {w: follows[w] for w in found} == found and len(found) > len(said) / 2


def test_places_of_the_second_picture_are_labelled_with_their_change():
    names, kinds = [*PARTS, *LATER], ("", "gone", "new", "now", "now a")
    for one in (item("train", "compare", k) for k in range(8)):
        side = one.scenes[0].width // CELL
        labels = token_labels(one.scenes).reshape(2, -1, len(names))
        assert (labels[0, :, names.index("change")] < 0).all() and len(labels[1]) == side**2
        found = {}
        for row in labels[1]:
            if kind := kinds[row[names.index("change")]]:
                found.setdefault(PLACES[row[names.index("place")]], set()).add(kind)
        said = {f.key: {" ".join(f.value.split()[4:6])} for f in one.facts}
        said = {k: {"now a" if w == "now a" else w.split()[0] for w in v} for k, v in said.items()}
        assert found == said


@pytest.mark.parametrize(
    "name, shares",
    [
        (
            "tiny-qwen3-vl-hard",
            (("picture", 0.3), ("read", 0.2), ("follow", 0.2), ("compare", 0.3)),
        ),
        ("tiny-gemma3", (("picture", 0.5), ("read", 0.5))),
    ],
)
def test_batches_depend_on_their_number_alone(name, shares):
    _, processor = zoo.load(name)
    family = PLANS[name].family
    packer = Packer(processor.tokenizer, family)
    pads = processor.tokenizer.convert_tokens_to_ids([family.placeholder(k) for k in family.kinds])
    stage = LongStage("x", 9, shares=shares, vision_lr=1.0, text_lr=1.0, batch=4)
    maker, again = LongBatches(packer, 0, [stage]), LongBatches(packer, 0, [stage])
    for step in (3, 1):
        first, second = maker.make(0, step), again.make(0, step)
        assert all(np.array_equal(first[k], second[k]) for k in first if k != "names")
        assert first["names"] == second["names"]
        visual = np.isin(first["ids"], pads).sum(1)
        assert (visual == first["cells"].shape[1]).all()
