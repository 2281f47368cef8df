"""Long answers: what is stored, what is counted, and what tokens of an answer may read."""

import csv
import io

import numpy as np
import pytest
import torch

from benchmarks import publishing
from benchmarks.long import choice, confirm, forced, page
from benchmarks.long.answers import (
    KINDS,
    RATIOS,
    Answers,
    Group,
    by_length,
    by_place,
    methods,
    pack,
    path_of,
)
from benchmarks.models import total
from tokencomp import zoo
from tokencomp.evaluation.patches import PatchedModels
from tokencomp.evaluation.settings import FULL, Setting
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.zoo.shapesqa.facts import write
from tokencomp.zoo.shapesqa.long_scenes import item

ABOUT = {
    "command": "x", "date": "2026-01-01", "commit": "0" * 40, "versions": {},
    "hardware": {"cpu": "x", "threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def answers():
    """The right answers as the full model's; a method that loses every third fact of an answer."""
    names = [f"validation-{family}-{k:05d}" for family in ("describe", "read") for k in range(6)]
    items = [item("validation", family, k) for family in ("describe", "read") for k in range(6)]
    lossy = [write(one.family, [f for n, f in enumerate(one.facts, 1) if n % 3]) for one in items]
    stored = Answers()
    texts = {FULL: [one.answer for one in items], "auto-0.5": lossy}
    stored.add("images", names, texts, {FULL: 0.0, "auto-0.5": 0.5}, {"commit": "0" * 40})
    return stored, items


def test_answers_are_read_as_they_were_written(answers, tmp_path):
    stored, _ = answers
    stored.write(tmp_path / "answers.json")
    again = Answers.read(tmp_path / "answers.json")
    assert again == stored
    assert max(map(len, (tmp_path / "answers.json").read_text().splitlines())) <= 420
    with pytest.raises(ValueError, match="other items"):
        again.add("images", ["validation-read-00009"], {}, {}, {})


def test_facts_are_counted_by_place_and_by_length(answers):
    stored, items = answers
    group = Group.of(stored, "images", ("describe", "read"))
    for where in (by_place(3, 3), by_place(4, 6), by_length(1, 6), by_length(7, 40)):
        total, shares = 0, []
        for one in items:
            kept = facts = 0
            for number in range(1, len(one.facts) + 1):
                if where(number, len(one.facts)):
                    facts, kept = facts + 1, kept + bool(number % 3)
            total += facts
            shares += [kept / facts] if facts else []
        assert group.total(where) == total
        if total:
            mean = sum(shares) / len(shares)
            assert group.retention(["auto-0.5"], where).value == pytest.approx(mean)
    facts = sum(len(one.facts) for one in items)
    lost = sum(len(one.facts) // 3 for one in items)
    shares = group.shares(["auto-0.5"])
    assert shares["left_out"] == pytest.approx(lost / facts) == 1 - shares["right"]
    assert shares["invented"] == shares["changed"] == 0 and shares["ordered"] == 1


def test_tokens_of_an_answer_read_the_rows_of_their_largest_scores():
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    visual, prompt = torch.tensor([1, 2, 3, 5, 6, 8, 9]), 12
    mask = forced.reading_mask(scores, visual, prompt, 3)[0, 0]
    for query in range(16):
        for key in range(16):
            sees = key <= query
            if query >= prompt and key in visual.tolist():
                row = scores[query - prompt + 1]
                sees = row[visual.tolist().index(key)] >= row.sort(descending=True).values[2]
            assert mask[query, key] == sees


@pytest.fixture(scope="module")
def loaded():
    return zoo.load()


def test_forced_tokens_are_those_that_generate_writes(loaded):
    """After a prefill of the prompt alone, each setting agrees with its own greedy answer."""
    model, processor = loaded
    one = item("validation", "compare", 0)
    inputs = build_inputs(processor, [list(one.media())], [one.question])
    for setting in (Setting(), Setting("auto", 0.75), Setting("fastv", 0.75)):
        with PatchedModels({"": model}) as patches, patches.applied(setting, [one.id]):
            out = model.generate(**inputs, do_sample=False, max_new_tokens=20, eos_token_id=-1)
        ids = out[:, inputs["input_ids"].shape[1] :]
        prompt, start = forced.prompt_of(processor, model, one)
        with PatchedModels({"": model}) as patches, patches.applied(setting, [one.id]):
            logits = forced._continued(model, prompt, ids, start)
        assert torch.equal(logits.argmax(-1), ids)


def test_readers_of_the_whole_cache_are_the_full_model(loaded):
    model, processor = loaded
    items = [item("validation", family, 1) for family in ("describe", "follow")]
    inputs = [build_inputs(processor, [list(one.media())], [one.question]) for one in items]
    texts = [generate(model, processor, one, 12)[0] for one in inputs]
    full = forced.agreement(model, processor, items, texts, [Setting()])[FULL]
    assert full == [[1] * len(forced.answer_ids(processor, text)) for text in texts]
    found = forced.readers(model, processor, items, texts, (0.0,))
    assert found == {f"{reader} 0.0": full for reader in forced.READERS}


def test_facts_of_tokens():
    processor = zoo.load()[1]
    groups = forced.facts_of(processor, "describe", "a red; a blue ring.")
    assert groups[-1] == -1 and groups[0] == 0 and groups[-2] == 1
    assert np.diff(groups[:-1]).sum() == 1
    assert forced.facts_of(processor, "read", "cat dog box") == [0, 1, 2, -1]


def test_the_page_shows_what_is_stored(monkeypatch, tmp_path):
    """Every answer loses its last fact, but those of the full model and of `condiv`."""
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    stored, held = Answers(), {}
    for kind, families in KINDS.items():
        items = [item("validation", family, k) for family in families for k in range(2)]
        whole = [one.answer for one in items]
        short = [write(one.family, one.facts[:-1]) for one in items]
        labels = [s.label for s in methods(kind)]
        texts = {k: whole if k.startswith(("full", "condiv")) else short for k in labels}
        stored.add(kind, [one.id for one in items], texts, dict.fromkeys(labels, 0.5), ABOUT)
        some = [f"{name}-{ratio}" for name in ("auto", "condiv") for ratio in RATIOS]
        held[kind] = {
            "facts": [[0, 0, 1, 1, -1]],
            "settings": {label: [[1, 1, 1, 0, 1]] for label in some},
            "readers": {f"{r} {q}": [[1, 1, 1, 1, 0]] for r in forced.READERS for q in RATIOS},
        }
    for kind in KINDS:
        one = Answers(stored.about, *({kind: x[kind]} for x in (stored.ids, stored.texts)))
        one.reached = {kind: stored.reached[kind]}
        one.write(path_of(tmp_path, "test", kind))
    publishing.write(tmp_path / "forced.json", {"about": [ABOUT], "packed": pack(held)})
    made = page.files()
    text = made[tmp_path / "README.md"]
    counts = [len(item("validation", "follow", k).facts) for k in range(2)]
    facts, mean = sum(counts), sum((n - 1) / n for n in counts) / 2
    for kind, cell in (("clips", f"{mean:.1%}"), ("clips", "100.0%")):
        assert f"| {cell} [" in text.partition(f"## {kind.capitalize()}")[2]
    rows = [*csv.DictReader(io.StringIO(made[tmp_path / "results.csv"]))]
    by_method = {(r["media"], r["family"], r["method"], r["ratio"]): r for r in rows}
    one = by_method["clips", "follow", "auto", "0.75"]
    assert float(one["left_out"]) == pytest.approx(2 / facts, abs=1e-3)
    assert float(by_method["images", "all", "condiv", "0.9"]["retention"]) == 1
    assert "| auto | 50.0% | 50.0% | 50.0% |" in text
    assert "| *full cache, rows by fact* | 100.0% | 100.0% | 100.0% |" in text


LOST = {"random": 0, "auto": 1, "condiv": 2, "kcenter": 3, "fastv": 4}


def test_confirmed_orders():
    """Of three methods that lose one, two and three facts, one of the differences is turned."""
    families = ("describe", "count")
    items = [item("validation", family, k) for family in families for k in range(40)]

    def stored(lost):
        texts = {FULL: [one.answer for one in items]}
        for method, count in lost.items():
            for ratio in RATIOS:
                texts[Setting(method, ratio).label] = [
                    write(one.family, one.facts[: max(0, len(one.facts) - count)]) for one in items
                ]
        out = Answers()
        out.add("images", [one.id for one in items], texts, dict.fromkeys(texts, 0.5), ABOUT)
        return out

    first = stored(LOST)
    same = confirm.section("family", first, first)
    assert "| auto − kcenter | 0.5 |" in same and "| auto − fastv | 0.5 |" in same
    assert "order is the same" in same and "9 here, 9 of them in both with one sign" in same
    tied = stored({"auto": 1, "condiv": 1, "kcenter": 3, "fastv": 4})
    text = confirm.section("family", first, tied)
    assert "order is the same" in text and "6 here, 6 of them in both" in text
    turned = stored({"auto": 2, "condiv": 1, "kcenter": 3, "fastv": 4})
    text = confirm.section("family", first, turned)
    assert "order is not the same" in text and "6 of them in both with one sign, 3 with" in text
    text = confirm.section("family", first, stored(dict.fromkeys(LOST, 1)))
    assert "order is the same" in text and "and 0 here, 0 of them in both" in text


def test_every_setting_has_a_label_of_its_own():
    for kind in ("images", "clips"):
        labels = [s.label for s in methods(kind)]
        assert len({*labels}) == len(labels)


def test_the_rule_on_hand_made_cells():
    """Two tied candidates: the one with more to spare, though its score is lower."""
    names = ("condiv", "kcenter, merged", "condiv, merged")
    values = ((0.90, False, 9.0), (0.94, True, -3.0), (0.95, True, -5.0))
    rows = [
        {"candidate": n, "score": s, "tied": t, "spare": m}
        for n, (s, t, m) in zip(names, values, strict=True)
    ]
    assert choice.chosen(rows) == "kcenter, merged"
    rows[0] |= {"tied": True, "spare": -3.0}  # the previous default stays
    assert choice.chosen(rows) == "condiv"


def test_long_answers_are_cells_of_shares(answers):
    """Every third fact of an answer is lost, so that n facts keep n - n // 3."""
    stored, items = answers
    group = Group.of(stored, "images", ("describe", "read"))
    cell = choice.LongResults({"model": "m"}, {"images": group})
    kept = [(n - n // 3) / n for n in (len(one.facts) for one in items)]
    assert cell.scores("auto-0.5", "images") == pytest.approx(kept)
    assert cell.scores(FULL, "images") == [1.0] * len(items)
    assert (len(cell.select("images")), cell.select("videos")) == (len(items), [])


@pytest.mark.parametrize(
    ("prefill", "step", "last"),
    [(50.0, 10.0, 41), (50.0, 8.0, np.inf), (95.0, 10.0, 0), (90.0, 9.0, np.inf), (20.0, 11.0, 36)],
)
def test_the_longest_answer_that_saves_a_tenth(prefill, step, last):
    """Against 100 ms and 10 ms a token; every length is tried."""
    alone, row = (
        {"prefill_ms": [first], "step_ms": [each]}
        for first, each in ((100.0, 10.0), (prefill, step))
    )
    saves = [
        n
        for n in range(1, 1000)
        if prefill + (n - 1) * step <= 0.9 * (100.0 + (n - 1) * 10.0) + 1e-9
    ]
    wanted = np.inf if len(saves) == 999 else max(saves, default=0)
    found = total.longest(row, alone)
    assert wanted == last and (found == last or int(found) == last)
    assert total.total(row, 5) == prefill + 4 * step
