"""The accuracy benchmark's results and tables, on results made up by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accuracy_support import BLIND, ITEMS, SHARES, answers, made_up
from torch import nn

from tokencomp.errors import OptionError, UnknownNameError
from tokencomp.evaluation.settings import Setting


def test_learned_is_decided_by_validation_and_the_blind_guess(accuracy, tmp_path: Path) -> None:
    """70 % is 45 points above a guess among four, and 20 above one of two named options."""
    made_up(tmp_path, {"full": 0.7}, "validation")
    folder = made_up(tmp_path, {"full": 1.0, "condiv-0.9": 0.2})
    assert accuracy.results.Results.read(folder, "test").learned == ("attribute", "needle")


def test_tables(accuracy, tmp_path: Path) -> None:
    made_up(tmp_path, {"full": 0.7}, "validation")
    folder = made_up(tmp_path, {**SHARES, "condiv-0.9": 0.6, "merge-0.9": 0.2})
    results = accuracy.results.Results.read(folder, "test")
    tables, report = accuracy.tables, accuracy.report
    assert tables.kept(results, "condiv-0.9", "images").value == pytest.approx(24 / 28)
    rows = tables.ratio_table(results, 0.9, "condiv").splitlines()[2:]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["random", "uniform", "downscale", "**condiv**", "merge"]
    assert "+" in rows[3].split("|")[6] and "−" in rows[4].split("|")[6]
    against = [row.split("|")[7].strip() for row in rows]  # 20, 8, 4 and 32 only one got right
    assert against == ["1.9e-06 −", "0.0078 −", "0.12", "", "4.7e-10 −"]
    told = report.bars(results, "condiv")
    assert [line for line in told if "below downscale" in line] == [
        f"- ratio 0.9, {kind}: below downscale (0 items won, 2 lost, p = 0.5): NOT met"
        for kind in ("images", "videos")
    ]
    assert sum("bar 94%: NOT met" in line for line in told) == 2
    text = report.write_report(tmp_path).read_text()
    assert "made-up, ratio 0.9" in text and (tmp_path / "made-up-images.svg").exists()
    assert text == report.write_report(tmp_path).read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 6 and [n for n in links if not (tmp_path / n).exists()] == []


def test_losses_per_family_by_plain_counting(accuracy, tmp_path: Path) -> None:
    made_up(tmp_path, {"full": 0.7}, "validation")
    folder = made_up(tmp_path, {**SHARES, "condiv-0.9": 0.6})
    results = accuracy.results.Results.read(folder, "test")
    for row in (r for r in results.rows if r["family"] == "position"):
        row["correct"]["random-0.9"] = 1
    every = accuracy.tables.compare_families(results, "condiv")
    losses = [one for one in every if one.lost]
    found = {(one.family, one.base): (one.test.wins, one.test.losses) for one in losses}
    expected = {("position", "random"): (0, 16)}  # 24 of 40 right, against all
    expected |= {(family, "downscale"): (0, 2) for family in BLIND}
    assert found == expected and len(every) == 9
    row = "| position | no | 0.9 | random | 70% | 60% | 100% | 0 | 16 |"
    assert row in accuracy.tables.loss_table(losses)
    told = accuracy.report.bars(results, "condiv")[-2:]
    assert told[0].startswith("- learned families: a baseline got more right in ")
    assert told[1].startswith("- families not learned: a baseline got more right in ")
    counts = [re.search(r"in (\d+) of (\d+) comparisons", line).groups() for line in told]
    assert [sum(map(int, column)) for column in zip(*counts, strict=True)] == [4, 9]
    assert all("of them the default got less right than the full model" in line for line in told)


def test_smaller_media_of_too_many_tokens_are_no_baseline_on_that_kind(
    accuracy, tmp_path: Path
) -> None:
    made_up(tmp_path, {"full": 0.7}, "validation")
    folder = made_up(tmp_path, {**SHARES, "condiv-0.9": 0.6})
    results = accuracy.results.Results.read(folder, "test")
    results.settings["downscale-0.9"]["achieved"] = {"images": 0.0, "videos": 0.88}
    cells = accuracy.tables.ratio_table(results, 0.9, "condiv").splitlines()[4].split("|")
    assert [c.strip() for c in cells[2:6]] == ["–", cells[3].strip(), "–", "–"]
    assert cells[3].strip().startswith("92.9%") and "0.000 / 0.880" in cells[8]
    told = "\n".join(accuracy.report.bars(results, "condiv"))
    assert "no baseline on images: it drops 0.00 instead of 0.9" in told
    assert "videos: below downscale" in told and "images: below downscale" not in told


def test_one_family_alone_can_be_reported(accuracy, tmp_path: Path) -> None:
    made_up(tmp_path, {"full": 0.7}, "validation")
    folder = made_up(tmp_path, {**SHARES, "condiv-0.9": 0.6})
    lines = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(lines[:ITEMS]))
    text = accuracy.report.write_report(tmp_path).read_text()
    assert "made-up-images.svg" in text and "made-up-videos.svg" not in text


def test_readme_has_methods_by_ratios_over_learned_families(accuracy, tmp_path: Path) -> None:
    for name in ("tiny-qwen2-vl", "other"):
        made_up(tmp_path, {"full": 0.7}, "validation", name)
        made_up(tmp_path, {**SHARES, "condiv-0.9": 0.6, "selector-0.9": 0.65}, "test", name)
    found = accuracy.report.read_all(tmp_path)
    first, second, _ = accuracy.readme.readme(found, "condiv").split("\n\n")
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in first.splitlines()}
    methods = ["selector (trained)", "**condiv**", "random", "uniform", "downscale"]
    assert list(rows)[2:] == [*methods, "FLOPs left (LLM, text included)"]
    assert rows["**condiv**"].startswith("85.7% [") and rows["random"].startswith("50.0% [")
    assert rows["uniform"] == "71.4%"
    assert second.count("| other |") == 4 and "selector" not in second


def test_a_later_run_adds_to_what_is_there(accuracy) -> None:
    r = accuracy.results
    first = r.collected(answers({"full": [True, True], "merge-0.5": [True, False]}), "m", "test")
    later = answers({"full": [True, True], "random-0.5": [False, True]}, seed=1)
    both = r.merged(first, r.collected(later, "m", "test"))
    assert [row["correct"] for row in both.rows] == [
        {"full": 1, "merge-0.5": 1, "random-0.5": 0},
        {"full": 1, "merge-0.5": 0, "random-0.5": 1},
    ]
    assert [run["seed"] for run in both.manifest["runs"]] == [0, 1]
    assert {k: s["run"] for k, s in both.settings.items()} == {
        "full": 1, "merge-0.5": 0, "random-0.5": 1,
    }  # fmt: skip
    assert both.settings["random-0.5"]["achieved"] == {"images": 0.5}
    assert not any("seconds" in s for s in both.settings.values())
    again = answers({"full": [True, True], "merge-0.5": [False, False]}, seed=2)
    newest = r.merged(both, r.collected(again, "m", "test"))
    assert [row["correct"]["merge-0.5"] for row in newest.rows] == [0, 0]
    assert [run["seed"] for run in newest.manifest["runs"]] == [1, 2]  # nothing is left of run 0


def test_other_weights_and_other_items_are_not_merged(accuracy, tmp_path: Path) -> None:
    r = accuracy.results
    first = r.collected(answers({"full": [True, True]}), "m", "test")
    with pytest.raises(OptionError, match="other weights"):
        r.merged(first, r.collected(answers({"full": [True, True]}, weights="v"), "m", "test"))
    with pytest.raises(OptionError, match="other items"):
        r.merged(first, r.collected(answers({"full": [True]}), "m", "test"))
    del first.manifest["runs"][0]["weights"]  # as before it was noted: the answers tell
    r.merged(first, r.collected(answers({"full": [True, True]}, weights="v"), "m", "test"))
    with pytest.raises(OptionError, match="other weights"):
        r.merged(first, r.collected(answers({"full": [True, False]}), "m", "test"))
    first.write(tmp_path)
    accuracy.run.check_items(tmp_path, "test", ["0", "1"])
    with pytest.raises(OptionError, match="--out"):
        accuracy.run.check_items(tmp_path, "test", ["0"])


def test_settings_of_a_run(accuracy) -> None:
    run = accuracy.run
    labels = [s.label for s in run.settings(["downscale", "cdpruner"], [0.5])]
    attention = "cdpruner-0.5-relevance=attention"
    assert labels == ["full", "downscale-0.5", "cdpruner-0.5", attention]
    with pytest.raises(UnknownNameError):
        run.usable(None, ["condvi"])
    assert run.usable(None, ["downscale"]) == (["downscale"], {})
    watching = Setting("condiv", 0.5, {"signal": "vit_attention"})
    asked = [Setting(), Setting("condiv", 0.5), Setting("downscale", 0.5), watching]
    assert [run.watches_tower(s) for s in asked] == [False, False, False, True]


def test_tower_runs_once_per_input(scripts) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Linear(2, 2)

    model, calls = Model(), []
    model.visual.register_forward_hook(lambda *_: calls.append(1))
    plain, run = torch.ones(2, 2), model.visual.forward
    count = []
    monkey = model.visual.forward
    model.visual.forward = lambda x: (count.append(1), monkey(x))[1]
    with scripts.run.tower_once(model):
        first = model.visual(plain)
        assert torch.equal(first, model.visual(plain.view(2, 2))) and len(count) == 1
        model.visual(plain + 1)
        model.visual(plain[:1])
        assert len(count) == 3
    assert len(calls) == 4
    assert torch.equal(run(plain), first)
