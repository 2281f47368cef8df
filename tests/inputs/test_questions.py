"""Questions of a file, their prompts, and which predictions count as right."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.trained import tiny

from tokencomp import zoo
from tokencomp.inputs.files import FileQuestions
from tokencomp.inputs.prompts import build_inputs, media_chat
from tokencomp.inputs.questions import Example
from tokencomp.zoo.shapesqa.items import item


def read(folder: Path, *rows: dict[str, Any]) -> list[Example]:
    """The questions of a file with these rows, all about one picture."""
    (folder / "a.png").touch()
    file, common = folder / "q.jsonl", {"question": "What?", "media": "a.png"}
    file.write_text("".join(json.dumps({**common, **row}) + "\n" for row in rows))
    return list(FileQuestions(file))


def test_any_answer_of_a_list_is_right(tmp_path: Path) -> None:
    words, option = read(tmp_path, {"answer": ["red ", "crimson"]}, {"answer": ["B", "yield"]})
    said = ("Red.", "crimson", "['red', 'crimson']", "blue")
    assert [words.correct(one) for one in said] == [True, True, False, False]
    said = ("(B) a sign", "Yield", "A", "yield sign")
    assert [option.correct(one) for one in said] == [True, True, False, False]
    assert (words.answer, words.also) == ("red", ("crimson",))


@pytest.mark.parametrize(
    "answer, said, right",
    [
        ("...", "", False),
        ("+", "-", False),
        ("-5", "5", False),
        ("5", "It is -5", False),
        ("-5", "-5.", True),
        ("-5", "−5", True),  # a minus sign
        ("की", "का", False),  # Hindi: of, in two genders
        ("की", "की।", True),
        ("ros\u00e9", "Rose\u0301", True),
        ("ros\u00e9", "rose", False),
        ("102", "10²", False),
    ],
)
def test_signs_and_accents_count(answer: str, said: str, right: bool) -> None:
    assert Example("", "", answer).correct(said) is right
    assert Example("", "", said).correct(answer) is right


SIGNS = "Which sign?\nA. stop\nB. yield\n"


@pytest.mark.parametrize(
    "answer, said, right",
    [
        ("B", "b", True),
        ("B", "(b)", True),
        ("B", "b. yield", True),
        ("B", "b yield", False),
        ("B", "a", False),
        ("A", "a red sign", False),
        ("A", "a.m.", False),
        ("b", "B", True),
        ("b", "(B) yield", True),
        ("b", "a", False),
        ("(B)", "B. yield", True),
        ("B. yield", "B", True),
        ("B. yield", "A. yield", False),
        ("B. yield", "B. Yield!", True),
        ("B", "B and C", True),  # the first letter
        ("E. coli", "E. faecalis", False),  # no option of the question
        ("E. coli", "e. coli", True),
    ],
)
def test_options_are_named_in_either_case_and_as_on_their_line(
    answer: str, said: str, right: bool
) -> None:
    assert Example("", SIGNS, answer).correct(said) is right


WORDS = [
    "yes", "Yes.", " yes!\n", "**yes**", "(yes)", "yes ✔️", "no", "ja", "one two", "One, two",
    "one-two", "one\ntwo", "3", "3.", "- 3", "+3", "10-3", "10 3", "10–3", "2:30", "2 30", "a_b",
    "B 1️⃣", "b 1", "été", "ÉTÉ", "红色", "红色。", "don't", "don t", "1.5", "1,5", "$3", "3 %",
]  # fmt: skip


def test_words_are_graded_as_the_published_answers_were() -> None:
    """The rule of all published results, on every pair."""
    for answer, said in itertools.product(WORDS, WORDS):
        before = [re.findall(r"\w+", text.lower()) for text in (answer, said)]
        assert Example("", "", answer).correct(said) is (before[0] == before[1]), (answer, said)


def test_contents_change_with_the_files_alone(tmp_path: Path) -> None:
    clip, folder = tmp_path / "long.mp4", tmp_path / "frames"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"a")
    clip.write_bytes(bytes(5 << 20))
    one = Example("", "", "", (str(clip), folder))
    first = one.contents()
    shutil.copytree(tmp_path, tmp_path / "copy")
    moved = [tmp_path / "copy" / p.name for p in (clip, folder)]
    clip.touch()
    assert first and first == one.contents() == Example("", "", "", tuple(moved)).contents()
    (folder / "1.png").write_bytes(b"b")
    second = one.contents()
    with clip.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"z")
    assert len({first, second, one.contents()}) == 3
    clip.unlink()
    assert one.contents() == Example("", "", "").contents() == ""


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
