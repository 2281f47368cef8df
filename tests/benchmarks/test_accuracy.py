"""Tables, statistics and the choice of the default, on results made up by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support import matrix
from support.accuracy import BLIND, SHARES, sweep_runs, write_results
from support.families import FAMILIES
from torch import nn

import tokencomp
from benchmarks.accuracy import report, run, store
from benchmarks.accuracy.store import Results
from benchmarks.accuracy.studies import baselines, ranking
from tokencomp import make_reducer
from tokencomp.errors import OptionError
from tokencomp.plan.plan import keep_count


def results_of(folder: Path, shares: dict[str, float], **more) -> Results:
    """Test results beside validation results in which the full model answers 70 %."""
    write_results(folder, {"full": 0.7}, "validation")
    return Results.read(write_results(folder, shares, **more), "test")


def test_learned_is_decided_by_validation_and_the_blind_guess(unpublished: Path) -> None:
    """70 % is 45 points above a guess among four, and 20 above one of two named options."""
    results = results_of(unpublished, {"full": 1.0, "condiv-0.9": 0.2})
    assert results.learned == ("attribute", "needle")


def test_a_record_by_plain_counting(unpublished: Path) -> None:
    """Two families of 40 questions are learned; a label answers the first ones of each."""
    results = results_of(unpublished, {**SHARES, "condiv-0.9": 0.6, "bipartite-0.9": 0.2})
    assert report.kept(results, "condiv-0.9", "images").value == pytest.approx(24 / 28)
    records = {label: report.record(results, label) for label in results.settings}
    one = records["condiv-0.9"]
    assert one["kept_both"] == pytest.approx(24 / 28) and one["kept_both_low"] < one["kept_both"]
    assert one["accuracy"] == 0.6 and one["vs_full"] == pytest.approx(-0.1)
    assert one["vs_random"] == pytest.approx(0.25) and one["vs_downscale"] == pytest.approx(-0.05)
    assert one["where_downscale_fails"] == 0.0  # of the 28 that downscaling gets wrong
    assert one["same_answer"] == pytest.approx(0.9)  # 24 right in both, 12 wrong in both
    p = [records[f"{name}-0.9"]["p_default"] for name in ("random", "uniform", "downscale")]
    assert p == [2 * 0.5**20, 2 * 0.5**8, 0.125] and one["p_default"] is None  # only one got right
    families = {k: v for k, v in one.items() if k.startswith("family_")}
    assert families == {f"family_{name}": 0.6 for name in BLIND}


def test_the_mean_of_the_seeds_is_the_baseline(unpublished: Path) -> None:
    """60 against the mean of 35 and 45 %."""
    shares = {**SHARES, "random-0.9-seed=1": 0.45, "condiv-0.9": 0.6}
    results = results_of(unpublished, shares).averaged()
    assert report.record(results, "condiv-0.9")["vs_random"] == pytest.approx(0.2)
    random = report.record(results, "random-0.9")
    assert random["seeds"] == 2 and random["accuracy"] == pytest.approx(0.4)


def test_losses_per_family_by_plain_counting(unpublished: Path) -> None:
    shares = {**SHARES, "condiv-0.9": 0.6}
    results = results_of(unpublished, shares, bonus={("position", "random-0.9"): 1.0})
    every = report.compare_families(results, "condiv")
    losses = [one for one in every if one.lost]
    counts = {(one.family, one.base): (one.test.wins, one.test.losses) for one in losses}
    expected = {("position", "random"): (0, 16)}  # 24 of 40 right, against all
    expected |= {(family, "downscale"): (0, 2) for family in BLIND}
    assert counts == expected and len(every) == 9


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


@pytest.mark.parametrize("seed", range(5))
def test_holm_by_its_definition(seed: int) -> None:
    """Rejected at any level: the smallest p-values, as long as p(k) < level / (m - k)."""
    values = np.random.default_rng(seed).uniform(0, 0.1, 7).round(2).tolist()  # with ties
    adjusted = baselines.holm(values)
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for k, i in enumerate(sorted(range(7), key=values.__getitem__)):
            if values[i] * (7 - k) >= level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p < level} == rejected
    assert baselines.holm([]) == []


FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"


def test_auto_is_the_recorded_choice() -> None:
    """The default of `patch` keeps what the rule has chosen for each kind."""
    stored = json.loads((FOLDER.parent / "long" / "choice.json").read_text())["chosen"]
    family = FAMILIES["qwen2_vl"]
    for options in ({}, {"reducer": "auto"}):
        with tokencomp.patch(family.build(), 0.5, **options) as handle:
            (stage,) = handle.plan.stages
            assert stage.merge == "auto"
    for kind, grid in (("images", (1, 8, 8)), ("videos", (6, 4, 4))):
        for ratio in (0.5, 0.9, 0.95):
            _, chosen = ranking.part((stored["reducer"], stored["options"]), kind, ratio)
            assert stage.merges(kind[:-1], 1 - ratio) is chosen.get("merge", False), (kind, ratio)
        for ratio, seed in itertools.product((0.5, 0.9, 0.95), range(5)):
            name, options = ranking.part((stored["reducer"], stored["options"]), kind, ratio)
            own = {key: value for key, value in options.items() if key != "merge"}
            tokens = dataclasses.replace(matrix.tokens(grid, seed=seed), modalities=[kind[:-1]])
            budget = keep_count(math.prod(grid), 1 - ratio)
            pair = stage.reducer, make_reducer(name, **own)
            kept = [matrix.kept(one, tokens, budget).patches for one in pair]
            assert torch.equal(*kept), (kind, ratio, seed)
