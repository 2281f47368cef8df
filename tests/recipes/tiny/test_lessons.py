"""What training adds to the benchmark: labels of characters, pairs, letters, the optimizer."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.packing import Packer
from recipes.tiny.batches import BatchMaker, Source
from recipes.tiny.families import family
from recipes.tiny.labels import glyph_boxes, owner_map, text_labels
from recipes.tiny.letters import dense_options, whole_form
from recipes.tiny.muon import Muon, orthogonal
from recipes.tiny.primers import PRIMERS, primer_pairs
from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer
from recipes.tiny.training_scenes import training_scene
from tokencomp.engine.rows.prompts import IGNORED
from tokencomp.zoo.shapesqa.items import stream
from tokencomp.zoo.shapesqa.lettering import Text
from tokencomp.zoo.shapesqa.scenes import Scene


def packer_of(name, tmp_path_factory):
    folder, arch = tmp_path_factory.mktemp("tokenizer"), family(name)
    write_tokenizer(folder, arch.chat_template, arch.special_tokens, arch.corpus)
    return Packer(load_tokenizer(folder), arch)


@pytest.fixture(scope="module")
def packer(tmp_path_factory):
    return packer_of("tiny-qwen3-vl", tmp_path_factory)


def test_characters_are_labelled_where_their_ink_is():
    """One long word at a large size: each cell's label is the character that covers it most."""
    text = Text("moon", 30, 60, 40)
    scene = Scene(224, 224, 1, (), texts=(text,))
    labels = text_labels(scene, 28)
    for row, column in zip(*np.nonzero(labels["glyph"] > 0), strict=True):
        overlap = {}
        for k, (_, left, right) in enumerate(glyph_boxes(text)):
            wide = min(right, 28 * column + 28) - max(left, 28 * column)
            overlap[k] = wide
        best = max(overlap, key=overlap.get)
        character = "abcdefghijklmnopqrstuvwxyz0123456789"[labels["glyph"][row, column] - 1]
        assert character == "moon"[best]
    assert (labels["glyph"] > 0).sum() >= 3 and labels["word"].max() > 0
    left, top, right, bottom = text.box
    assert (labels["word"][top // 28 : bottom // 28 + 1, left // 28 : right // 28 + 1] != 0).all()


def test_both_digits_are_labelled_where_the_middle_of_a_number_is():
    scene = Scene(224, 224, 1, (), texts=(Text("47", 30, 60, 20), Text("sun", 140, 150, 30)))
    digits = text_labels(scene, 28)["digits"]
    left, top, right, bottom = scene.texts[0].box
    middle = int((top + bottom) / 2) // 28, int((left + right) / 2) // 28
    assert digits[middle].tolist() == [4, 7]
    digits[middle] = IGNORED
    assert (digits == IGNORED).all()


def test_repeated_questions_differ_in_their_options(packer):
    """A picture with one word has one question; `repeat` asks it with other options each time."""
    source = Source("facts", families=("reading",), choice=1.0, repeat=True)
    maker = BatchMaker(packer, 0, 28)
    rng = stream("train", "repeat")
    scene = Scene(224, 224, 1, (), texts=(Text("moon", 30, 60, 40),))
    segments, names = maker._segments(scene, source, rng)
    prompts = [packer.tokenizer.decode(tokens[:-1]) for tokens, _ in segments]
    assert len(prompts) == len(set(prompts)) >= 4 and set(names) == {"reading/choice/fact"}
    for prompt, (_, labels) in zip(prompts, segments, strict=True):
        options = dict(re.findall(r"\(?([A-E])[.)] (\w+)", prompt))
        (answer,) = [packer.tokenizer.decode([i]) for i in labels if i != IGNORED]
        assert options[answer] == "moon"
    assert len(maker._segments(scene, replace(source, repeat=False), rng)[0]) == 1


@pytest.mark.parametrize(
    ("name", "placeholder"),
    [("tiny-qwen3-vl", "<|image_pad|>"), ("tiny-gemma3", "<image_soft_token>")],
)
def test_spelling_labels_the_token_in_the_middle_of_a_word(name, placeholder, tmp_path_factory):
    """Families name their visual tokens differently."""
    packer = packer_of(name, tmp_path_factory)
    """The cells are found here by arithmetic on the boxes of a word and of a digit."""
    word, digit = Text("moon", 30, 60, 40), Text("7", 150, 150, 40)
    scene = Scene(224, 224, 1, (), texts=(word, digit))
    row = packer.pack("image", (1, 224, 224), [packer.pair(" text", "moon")], 90)
    BatchMaker(packer, 0, 28).spell(row, scene, "image", 1)
    first = int(np.argmax(row["ids"] == packer.ids(placeholder)[0]))
    expected = {}
    for text in (word, digit):
        left, top, right, bottom = text.box
        cell = int((top + bottom) / 2) // 28 * 8 + int((left + right) / 2) // 28
        expected[first + cell] = packer.ids(text.text)[0]
    spelled = np.flatnonzero(row["which"] == 1)
    assert {int(at): int(row["labels"][at]) for at in spelled} == expected


def _seen(scene, shape, time=0.0):
    """Rows and columns of the pixels of the one object of a shape."""
    (index,) = [i for i, thing in enumerate(scene.things) if thing.shape == shape]
    return np.nonzero(owner_map(scene, time) == index)


def _frames(scene, **word):
    """Logical frames in which the one object with a word shows any pixel."""
    ((key, value),) = word.items()
    (index,) = [i for i, thing in enumerate(scene.things) if getattr(thing, key) == value]
    return [t for t in range(scene.frames) if (owner_map(scene, t) == index).any()]


@pytest.mark.parametrize("name", ["places", "sides", "numbers"])
def test_still_pairs_agree_with_pixels(name):
    checked = 0
    for index in range(12):
        rng = stream("train", "primers", index)
        scene = training_scene(rng, "usual", (1, 224, 224), (3, 5), 0.0)
        for key, value in primer_pairs(name, scene, rng):
            words = key.split()
            if name == "numbers":
                tally = [t for t in scene.things if words[1] in (t.shape, t.color, "objects")]
                assert int(value) == len(tally)
            elif name == "places":
                y, x = _seen(scene, words[0])
                axis = x if words[1] == "column" else y
                middle = (axis.min() + axis.max() + 1) / 2
                assert abs(int(value) + 0.5 - middle / 28) < 0.6  # the ink may be narrower
            else:
                axis = 1 if words[1] == "side" else 0
                a, b = (_seen(scene, w)[axis].mean() for w in (words[0], words[2]))
                assert value == (("left", "right") if axis else ("above", "below"))[int(a > b)]
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("name", ["moves", "when", "flashes", "shown", "before", "first"])
def test_clip_pairs_agree_with_frames(name):
    checked = 0
    for index in range(16):
        rng = stream("train", "clips", index)
        kind = "acts" if name in ("moves", "flashes", "shown") else "brief"
        scene = training_scene(rng, kind, (8, 224, 224), (2, 5), 0.0)
        for key, value in primer_pairs(name, scene, rng):
            words = key.split()
            if name == "moves":
                (y0, x0), (y1, x1) = (_seen(scene, words[0], t) for t in (0.0, 7.0))
                dx, dy = x1.mean() - x0.mean(), y1.mean() - y0.mean()
                sideways = ("left", "right")[int(dx > 0)]
                assert value == (sideways if abs(dx) > abs(dy) else ("up", "down")[int(dy > 0)])
            else:
                kinds = "shape" if any(t.shape == words[-1] for t in scene.things) else "color"
                if name == "shown":
                    pairs = {frame // 2 for frame in _frames(scene, shape=words[0])}
                    assert value == ("yes" if int(words[2]) in pairs else "no")
                elif name in ("when", "flashes"):
                    kinds = "shape" if any(t.shape == words[0] for t in scene.things) else "color"
                    frames = _frames(scene, **{kinds: words[0]})
                    right = frames[0] // 2 if name == "when" else len(frames)
                    assert int(value) == right
                elif name == "before":
                    a, b = (_frames(scene, shape=w)[0] for w in (words[0], words[2]))
                    assert value == ("before" if a < b else "after")
                else:
                    times = {w: _frames(scene, **{kinds: w})[0] for w in words[1:]}
                    pick = min if words[0] == "first" else max
                    assert value == pick(times, key=times.get)
            checked += 1
    assert checked > 8


def test_every_primer_is_one_token_per_word(packer):
    """A pair is one hop only when its last token is the whole last word of the key."""
    for name in PRIMERS:
        for index in range(4):
            rng = stream("train", "words", name, index)
            clips = {"moves": "acts", "when": "brief", "flashes": "acts", "shown": "acts"}
            shape = (8, 224, 224) if name in clips else (1, 224, 224)
            kind = clips.get(name, "usual")
            scene = training_scene(rng, kind, shape, (2, 5), 1.0)
            for key, value in primer_pairs(name, scene, rng):
                digits = sum(word.isdigit() for word in key.split())  # a space, then the digit
                assert len(packer.ids(key)) == len(key.split()) + digits, key
                assert len(packer.ids(value)) == (2 if value.isdigit() and len(value) > 1 else 1)


def test_dense_options_label_every_option(packer):
    for index in range(20):
        tokens, labels = dense_options(packer, stream("train", "dense", index))
        text = packer.tokenizer.decode(tokens)
        block, word_list = text.rsplit("\n", 1)
        letters = dict(re.findall(r"\n\(?([A-E])[.)] (\w+)", block))
        words = [w.strip() for w in word_list.split(",") if w.strip()]
        answers = [packer.tokenizer.decode([i]) for i in labels if i != IGNORED]
        assert sorted(words) == sorted(letters.values())
        assert [letters[a] for a in answers] == words
        assert len(tokens) == len(labels)


def test_whole_forms_are_answered_by_their_own_words(packer):
    for index in range(20):
        tokens, labels = whole_form(packer, stream("train", "forms", index))
        text = packer.tokenizer.decode(tokens[:-1])
        (answer,) = [packer.tokenizer.decode([i]) for i in labels if i != IGNORED]
        options = dict(re.findall(r"\n\(?([A-E])[.)] (\w+)", text))
        assert f" {options[answer]}" in text.split("\n")[0]


def test_numbers_among_options_cannot_be_told_apart_by_one_digit(packer):
    """A third of the blocks: every other option shares a digit with the number they come from."""
    blocks = []
    for index in range(60):
        text = packer.tokenizer.decode(dense_options(packer, stream("train", "dense", index))[0])
        words = re.findall(r"\n\(?[A-E][.)] (\w+)", text)
        if all(re.fullmatch(r"[1-9]\d", word) for word in words):
            blocks.append(words)
            assert len({*words}) == len(words)
            assert any(all({*a} & {*b} for b in words) for a in map(str, range(10, 100))), words
    assert 10 <= len(blocks) <= 30


@pytest.mark.parametrize("shape", [(128, 64), (64, 128), (96, 96)])
def test_orthogonal_keeps_singular_vectors(shape):
    """Against the SVD: same vectors, singular values within Muon's band around 1."""
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonal(x) @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3
    assert values[..., : min(shape) * 9 // 10].min() > 0.6 and values.max() < 1.3


def test_muon_steps_as_torch_does():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    torch.manual_seed(0)
    for shape in ((128, 192), (192, 128)):
        ours = torch.nn.Parameter(torch.randn(shape))
        theirs = torch.nn.Parameter(ours.detach().clone())
        a = Muon([ours], lr=0.01, weight_decay=0.01)
        b = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.01, momentum=0.95)
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            a.step()
            b.step()
        assert torch.allclose(ours, theirs, atol=5e-4)  # torch iterates in bfloat16
