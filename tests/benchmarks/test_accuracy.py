"""Results, tables and pages of the accuracy benchmark, on results made up by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.accuracy import BLIND, SHARES, sweep_runs, write_results
from support.family.hybrid import HYBRID
from torch import nn

from benchmarks.accuracy import report, run, store, tables
from benchmarks.accuracy.store import Results
from tokencomp.errors import OptionError


def results_of(folder: Path, shares: dict[str, float], **more) -> Results:
    """Test results beside validation results in which the full model answers 70 %."""
    write_results(folder, {"full": 0.7}, "validation")
    return Results.read(write_results(folder, shares, **more), "test")


def test_learned_is_decided_by_validation_and_the_blind_guess(unpublished: Path) -> None:
    """70 % is 45 points above a guess among four, and 20 above one of two named options."""
    results = results_of(unpublished, {"full": 1.0, "condiv-0.9": 0.2})
    assert results.learned == ("attribute", "needle")


def test_tables(unpublished: Path) -> None:
    results = results_of(unpublished, {**SHARES, "condiv-0.9": 0.6, "bipartite-0.9": 0.2})
    assert tables.kept(results, "condiv-0.9", "images").value == pytest.approx(24 / 28)
    rows = tables.ratio_table(results, 0.9, "condiv").splitlines()[2:]
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["random", "uniform", "downscale", "**condiv**", "bipartite"]
    assert "+" in rows[3].split("|")[6] and "−" in rows[4].split("|")[6]
    against = [row.split("|")[7].strip() for row in rows]  # 20, 8, 4 and 32 only one got right
    assert against == ["1.9e-06 −", "0.0078 −", "0.12", "", "4.7e-10 −"]
    lines = report.bars(results, "condiv")
    assert [line for line in lines if "below downscale" in line] == [
        f"- ratio 0.9, {kind}: below downscale (0 items won, 2 lost, p = 0.5): NOT met"
        for kind in ("images", "videos")
    ]
    assert sum("bar 94%: NOT met" in line for line in lines) == 2
    text = report.write_report(unpublished).read_text()
    assert "made-up, ratio 0.9" in text and (unpublished / "made-up-images.svg").exists()
    assert text == report.write_report(unpublished).read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 3 and [n for n in links if not (unpublished / n).exists()] == []


def test_differences_to_the_baselines_by_plain_counting(unpublished: Path) -> None:
    """Two families of 40 questions are learned; a label answers the first ones of each."""
    shares = {**SHARES, "random-0.9-seed=1": 0.45, "condiv-0.9": 0.6}
    results = results_of(unpublished, shares).averaged()
    text = tables.rivals_table(results, 0.9, "condiv").splitlines()
    rows = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in text}
    assert rows["method"][2] == "vs random" and len(text) == 2 + 4
    accuracy, full, random, small, detail, same = rows["**condiv**"]
    assert accuracy == "60.0%" and full.startswith("-10.0 [")
    assert random.startswith("+20.0 [")  # 60 against the mean of 35 and 45 %
    assert small.startswith("-5.0 [") and detail == "0% of 28"
    assert rows["random (2 seeds)"][0] == "40.0%"
    row = next(x for x in tables.ratio_table(results, 0.9, "condiv").splitlines() if "seeds)" in x)
    assert row.split("|")[4].endswith("], seeds 50.0% to 64.3% ")  # of 70 %
    assert same == "90.0%"  # 24 of 28 answers are right in both, 12 wrong in both: 36 of 40


def test_losses_per_family_by_plain_counting(unpublished: Path) -> None:
    shares = {**SHARES, "condiv-0.9": 0.6}
    results = results_of(unpublished, shares, bonus={("position", "random-0.9"): 1.0})
    every = tables.compare_families(results, "condiv")
    losses = [one for one in every if one.lost]
    counts = {(one.family, one.base): (one.test.wins, one.test.losses) for one in losses}
    expected = {("position", "random"): (0, 16)}  # 24 of 40 right, against all
    expected |= {(family, "downscale"): (0, 2) for family in BLIND}
    assert counts == expected and len(every) == 9
    row = "| position | no | 0.9 | random | 70% | 60% | 100% | 0 | 16 |"
    assert row in tables.loss_table(losses)
    lines = report.bars(results, "condiv")[-2:]
    assert lines[0].startswith("- learned families: a baseline answered more ")
    assert lines[1].startswith("- families not learned: a baseline answered more ")
    pairs = [re.search(r"in (\d+) of (\d+) comparisons", line).groups() for line in lines]
    assert [sum(map(int, column)) for column in zip(*pairs, strict=True)] == [4, 9]
    assert all("of them the default is also below the full model" in line for line in lines)


def test_a_later_run_is_merged_into_the_stored_results(tmp_path: Path) -> None:
    first = store.collected(
        sweep_runs({"full": [True, True], "bipartite-0.5": [True, False]}), "m", "test"
    )
    later = sweep_runs({"full": [True, True], "random-0.5": [False, True]}, seed=1)
    both = store.merged(first, store.collected(later, "m", "test"))
    both.write(tmp_path)
    both = Results.read(tmp_path, "test")
    assert both.answers.correct == {"full": [1, 1], "bipartite-0.5": [1, 0], "random-0.5": [0, 1]}
    assert both.answers.agrees == {"full": [1, 1], "bipartite-0.5": [1, 0], "random-0.5": [0, 1]}
    assert [one["seed"] for one in both.manifest["runs"]] == [0, 1]
    assert {k: s["run"] for k, s in both.settings.items()} == {
        "full": 1, "bipartite-0.5": 0, "random-0.5": 1,
    }  # fmt: skip
    assert both.settings["random-0.5"]["achieved"] == {"images": 0.5}
    assert not any("seconds" in s for s in both.settings.values())
    again = sweep_runs({"full": [True, True], "bipartite-0.5": [False, False]}, seed=2)
    newest = store.merged(both, store.collected(again, "m", "test"))
    assert newest.answers.correct["bipartite-0.5"] == [0, 0]
    assert [one["seed"] for one in newest.manifest["runs"]] == [1, 2]  # nothing is left of run 0


def test_other_weights_and_other_items_are_not_merged(tmp_path: Path) -> None:
    collected, right = store.collected, {"full": [True, True]}
    first = collected(sweep_runs(right), "m", "test")
    with pytest.raises(OptionError, match="other weights"):
        store.merged(first, collected(sweep_runs(right, weights="v"), "m", "test"))
    with pytest.raises(OptionError, match="other items"):
        store.merged(first, collected(sweep_runs({"full": [True]}), "m", "test"))
    del first.manifest["runs"][0]["weights"]  # runs of old releases have none: answers decide
    store.merged(first, collected(sweep_runs(right, weights="v"), "m", "test"))
    with pytest.raises(OptionError, match="other weights"):
        store.merged(first, collected(sweep_runs({"full": [True, False]}), "m", "test"))
    first.write(tmp_path)
    run.check_items(tmp_path, "test", ["0", "1"])
    with pytest.raises(OptionError, match="--out"):
        run.check_items(tmp_path, "test", ["0"])


def test_methods_that_a_model_refuses_are_left_out_with_the_reason() -> None:
    """The first layer of Qwen3.5 has no attention that could score tokens at entry."""
    model = HYBRID["qwen3_5"].build()
    ready, refused = run.usable(model, run.settings(["condiv", "divprune", "cdpruner"], [0.5]))
    assert [setting.label for setting in ready] == ["full", "divprune-0.5", "cdpruner-0.5"]
    assert [*refused] == ["condiv-0.5", "cdpruner-0.5-relevance=attention"]
    assert all("attention" in reason for reason in refused.values())


def test_tower_runs_once_per_input() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Linear(2, 2)

    model, calls = Model(), []
    model.visual.register_forward_hook(lambda *_: calls.append(1))
    plain, original = torch.ones(2, 2), model.visual.forward
    count = []
    model.visual.forward = lambda pixel_values: (count.append(1), original(pixel_values))[1]
    with run.tower_once(model):
        first = model.visual(plain)
        assert torch.equal(first, model.visual(plain.clone())) and len(count) == 1
        model.visual(plain + 1)
        model.visual(plain[:1])
        assert len(count) == 3
        model.visual(pixel_values=plain)  # as Gemma 3 calls its tower
        assert torch.equal(first, model.visual(pixel_values=plain)) and len(count) == 4
    assert len(calls) == 6
    assert torch.equal(original(plain), first)
