"""Answers made of facts: found as brute force finds them, and reported by place."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.console import run

from tokencomp.errors import OptionError
from tokencomp.evaluation import Setting, sweep
from tokencomp.evaluation.fact_places import facts_kept, place_names
from tokencomp.evaluation.group_runs import find_runs
from tokencomp.inputs.facts import Facts
from tokencomp.inputs.files import FileQuestions
from tokencomp.inputs.questions import Example
from tokencomp.pages.lost import draw_lost, lost_ids
from tokencomp.pages.report import lines

LETTERS = "abc"


def facts_of(*texts: str | Sequence[str], ordered: bool = False) -> Facts:
    return Facts(tuple((t,) if isinstance(t, str) else tuple(t) for t in texts), ordered)


def spots(fact: str, words: Sequence[str]) -> list[frozenset[int]]:
    """Every run of words that equals a fact, as the set of their numbers."""
    n = len(fact.split())
    return [
        frozenset(range(k, k + n)) for k in range(len(words)) if words[k : k + n] == fact.split()
    ]


def most_in_order(facts: Sequence[str], words: Sequence[str]) -> int:
    """Over all subsets of the facts and all places of each: the most that follow one another."""
    for count in range(len(facts), 0, -1):
        for some in itertools.combinations(facts, count):
            for places in itertools.product(*(spots(fact, words) for fact in some)):
                if all(max(a) < min(b) for a, b in itertools.pairwise(places)):
                    return count
    return 0


def drawn(seed: int) -> tuple[list[str], list[str]]:
    """One to four facts of one or two letters each, and up to eight words."""
    draw = random.Random(seed)
    facts = [
        " ".join(draw.choices(LETTERS, k=draw.choice((1, 2)))) for _ in range(draw.randint(1, 4))
    ]
    return facts, draw.choices(LETTERS + "d", k=draw.randint(0, 8))


@pytest.mark.parametrize("seed", range(200))
def test_facts_in_order_are_the_most_that_brute_force_finds(seed: int) -> None:
    facts, words = drawn(seed)
    kept = facts_of(*facts, ordered=True).found(" ".join(words)).kept
    assert sum(kept) == most_in_order(facts, words)
    assert most_in_order([f for f, k in zip(facts, kept, strict=True) if k], words) == sum(kept)


@pytest.mark.parametrize("seed", range(200))
def test_single_words_in_any_order_count_as_often_as_they_are_said(seed: int) -> None:
    draw = random.Random(seed)
    facts, words = draw.choices(LETTERS, k=5), draw.choices(LETTERS, k=6)
    kept = facts_of(*facts).found(" ".join(words)).kept
    for letter in LETTERS:
        right = sum(k for f, k in zip(facts, kept, strict=True) if f == letter)
        assert right == min(facts.count(letter), words.count(letter))


@pytest.mark.parametrize(
    ("facts", "answer", "kept", "invented"),
    [
        (("red cup", "large red cup"), "A large red cup.", (0, 1), 0),
        (("red cup", "large red cup"), "red cup; LARGE red cup", (1, 1), 0),
        ((("three forks", "3 forks"),), "There are 3 forks", (1,), 0),
        (("cup", "fork"), "1. cup. 2. spoon. 3. A fork. 4. plate!", (1, 1), 2),
        (("cup", "fork"), "- cup\n- knife\n\n- fork", (1, 1), 1),
        (("cup", "fork"), "", (0, 0), 0),
        (("cup",), "cup; cup", (1,), 0),  # said twice, yet not invented
        (("cup", "cup"), "cup", (1, 0), 0),
        (("3.5 m",), "It is 3.5 m wide. And red.", (1,), 1),
        (("-5",), "5", (0,), 1),
        (("wide",), "It is 3.5 m wide", (1,), 0),
        (("red cup", "cup blue plate"), "red cup blue plate", (0, 1), 0),  # one "cup" is said
    ],
)
def test_facts_of_answers(facts: tuple, answer: str, kept: tuple[int, ...], invented: int) -> None:
    found = facts_of(*facts).found(answer)
    assert (found.kept, found.invented) == (tuple(map(bool, kept)), invented)


def test_facts_by_place_are_of_questions_that_both_runs_answered() -> None:
    """The full model failed on question 2, the run on question 0."""
    full = [{"id": 0, "facts": (1, 1), "invented": 0}, {"id": 1, "facts": (1, 0), "invented": 0}]
    some = [{"id": 1, "facts": (1, 1), "invented": 3}, {"id": 2, "facts": (1, 1), "invented": 0}]
    run: Any = SimpleNamespace(answered=some)
    found = facts_kept(run, SimpleNamespace(answered=full))  # type: ignore[arg-type]
    assert found is not None and found.by_place[0] == 1 and math.isnan(found.by_place[1])
    assert (found.left_out, found.invented, found.facts[:3]) == (0, 3, (1, 1, 0))
    assert place_names(found) == {0: "1", 1: "2"}


def test_an_order_counts_where_it_is_asked_for() -> None:
    free, strict = (facts_of("one", "two", "three", ordered=o) for o in (False, True))
    assert free.found("three, one, two").kept == (True, True, True)
    assert strict.found("three, one, two").kept == (True, True, False)


def test_lines_of_a_file_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    file = tmp_path / "q.jsonl"
    good = {"question": "What?", "media": "a.png"}
    for row, reason in (
        ({"facts": "red"}, 'Give a list with a text for each'),
        ({"facts": []}, "Give a list with a text for each"),
        ({"facts": ["red", ""]}, "the fact 2 is ''"),
        ({"facts": ["red", []]}, "the fact 2 is None"),
        ({"facts": ["red", "…"]}, "fact 2 is '…', which has no word"),
        ({"facts": ["red"], "answer": "red"}, "an answer and facts. Give one of the two"),
        ({"facts": ["red"], "ordered": "yes"}, "ordered is 'yes'. Give true or false"),
        ({}, "'answer' is missing"),
    ):  # fmt: skip
        file.write_text(f"{json.dumps({**good, 'answer': 'red'})}\n{json.dumps({**good, **row})}\n")
        with pytest.raises(OptionError, match="line 2") as error:
            FileQuestions(file)
        assert reason in str(error.value), row


def questions(folder: Path, examples: Sequence[Example], said: Sequence[str]) -> Path:
    """Ask for what the full model says, in words, and for words that nobody says.

    The untrained model writes long words; an answer that says the others would fit the limit.
    """
    rows = []
    for example, text in zip(examples, said, strict=True):
        words = [w for w in re.findall(r"\w+", text.lower())][:4]
        rows.append(
            {"question": example.prompt, "media": str(example.media[0]),
             "facts": [*(["no", w] for w in words), ["nothing", "at all"]], "ordered": True}
        )  # fmt: skip
    file = folder / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_command_scores_facts_and_shows_their_places(
    examples, loaded, folder, tmp_path, capsys
) -> None:
    plain = sweep(*loaded, examples[:3], [Setting()], max_new_tokens=24)[Setting()]
    said = [record["prediction"] for record in plain.answered]
    file = questions(tmp_path, examples[:3], said)
    known = ("--data", file, "--model", folder, "--device", "cpu", "--max-new-tokens", 24)
    runs = tmp_path / "runs"
    assert run("eval", *known, "-r", "uniform", "--ratio", "0.75", "-o", runs, "--seeds", 2) == 0
    printed = capsys.readouterr().out
    assert "Facts by their place in the answer" in printed and "invented" in printed

    asked = [json.loads(line)["facts"][:-1] for line in file.read_text().splitlines()]
    records = [json.loads(x) for x in (runs / "full" / "records.jsonl").read_text().splitlines()]
    for record, words, text in zip(records, asked, said, strict=True):
        assert record["prediction"] == text
        assert record["facts"] == [1] * len(words) + [0]
        assert record["correct"] == pytest.approx(len(words) / (len(words) + 1))
    (full,) = [line for line in lines(find_runs([runs])) if line.run.label == "full"]
    assert full.facts.left_out == pytest.approx(3 / (3 + sum(map(len, asked))))
    assert run("report", runs, "-o", tmp_path / "page.html") == 0
    assert "Facts by their place in the answer" in (tmp_path / "page.html").read_text()


def test_retention_by_place_and_lost_facts_against_hand_counts(loaded, examples, tmp_path) -> None:
    """Records are written by hand, as untrained models say the same under every setting.

    place          1     2     3 to 4      facts lost
    full           1 1   1 0   1 - 0 -
    compressed     1 0   1 1   0 - 0 -     a: the third; b: the first
    """
    setting = Setting("uniform", 0.75)
    asked = [
        Example(e.id, e.prompt, "", e.media, e.family, facts=facts_of("w", "x", "y", "z"))
        for e in examples[:2]
    ]
    runs = sweep(*loaded, asked, [Setting(), setting], tmp_path, max_new_tokens=2)
    marks = {Setting(): ([1, 1, 1, 0], [1, 0]), setting: ([1, 1, 0, 0], [0, 1])}
    for key, one in runs.items():
        for record, facts in zip(one.records, marks[key], strict=True):
            record |= {"facts": facts, "correct": sum(facts) / len(facts), "invented": 3}
    kept = facts_kept(runs[setting], runs[Setting()])
    assert kept.by_place[:3] == (1 / 2, 2 / 1, 0 / 1)
    assert (kept.facts[:4], kept.left_out, kept.invented) == ((2, 2, 2, 0), 1 - 3 / 6, 3)
    full = facts_kept(runs[Setting()], runs[Setting()])
    assert full.by_place[:3] == (1.0, 0.5, 0.5)
    assert lost_ids(runs[setting], runs[Setting()]) == sorted(e.id for e in asked)
    by_id = {e.id: e for e in asked}
    shown = draw_lost(*loaded, runs[setting], runs[Setting()], by_id, tmp_path, per_kind=2)
    assert {item.id: item.facts for item in shown} == {asked[0].id: "y", asked[1].id: "w"}
