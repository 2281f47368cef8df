"""Comparisons with the baselines against brute force over answers that were written by hand."""

import json
from itertools import product

import numpy as np
import pytest
from evaluation.test_report import write_run

from tokencomp.evaluation.comparisons import comparisons, losses, paired_tests
from tokencomp.evaluation.group_runs import find_runs
from tokencomp.pages.report import lines as find_lines
from tokencomp.reducers.registry import make_reducer

ITEMS = [f"{group}{k}" for group in "ab" for k in range(8)]


@pytest.fixture
def runs(tmp_path):
    """Full, two seeds of random, downscaling and one method; answers drawn at random."""
    rng = np.random.default_rng(0)
    said = {}
    for name, ratio, options in (
        ("full", 0.0, {}),
        ("random", 0.5, {}),
        ("random", 0.5, {"seed": 1}),
        ("downscale", 0.5, {}),
        ("aim", 0.5, {}),
        ("random", 0.9, {}),
    ):
        scores = dict(zip(ITEMS, rng.integers(0, 2, len(ITEMS)).tolist(), strict=True))
        if name == "aim":  # all of group a right, none of group b
            scores = {i: int(i[0] == "a") for i in ITEMS}
        seed = f"-{options['seed']}" if options else ""
        folder = write_run(tmp_path / f"x{seed}", name, ratio, scores, options=options)
        path = folder / "records.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["prediction"] = str(rng.choice(["red", "blue "]))
        if name == "downscale":  # it never answered the first question
            rows[0] = {"id": rows[0]["id"], "family": "a", "error": "too large"}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        kept = {row["id"]: row for row in rows if "error" not in row}
        said[name + seed, ratio] = kept
    return find_runs(sorted(tmp_path.glob("x*"))), said


def _find(every, name, ratio):
    return next(r for r in every if (r.identity["reducer"], r.ratio) == (name, ratio))


def test_columns_equal_brute_force(runs):
    every, said = runs
    ours = comparisons(_find(every, "aim", 0.5), every)
    aim, full, small = said["aim", 0.5], said["full", 0.0], said["downscale", 0.5]
    a, b = said["random", 0.5], said["random-1", 0.5]
    n = len(ITEMS)
    assert ours.full.value == pytest.approx(
        sum(aim[i]["correct"] for i in ITEMS) / n - sum(full[i]["correct"] for i in ITEMS) / n
    )
    luck = sum(a[i]["correct"] + b[i]["correct"] for i in ITEMS) / (2 * n)
    assert ours.random.value == pytest.approx(sum(aim[i]["correct"] for i in ITEMS) / n - luck)
    assert ours.seeds == 2
    blurred = [i for i in ITEMS if i in small and not small[i]["correct"]]
    assert ours.detail_items == len(blurred)
    assert ours.detail == pytest.approx(sum(aim[i]["correct"] for i in blurred) / len(blurred))
    same = [aim[i]["prediction"].strip() == full[i]["prediction"].strip() for i in ITEMS]
    assert ours.agreement == sum(same) / n


def test_baselines_are_not_compared_with_themselves(runs):
    every, _ = runs
    one = comparisons(_find(every, "random", 0.5), every)
    assert one.random is None and one.downscale is not None
    other = comparisons(_find(every, "downscale", 0.5), every)
    assert other.downscale is None and other.detail == 0.0
    assert comparisons(_find(every, "random", 0.9), every).downscale is None


def test_a_baseline_with_options_of_a_method_is_a_method(tmp_path):
    """Seeds of random: 1 of 4 and 3 of 4, so ½; with merge=True 4 of 4, which would make it ⅔."""
    said = {"full": "1111", "random": "1000", "random-1": "1110", "random-m": "1111", "aim": "1100"}
    options = {"random-1": {"seed": 1}, "random-m": {"merge": True}}
    for name, marks in said.items():
        scores = dict(zip(("a1", "a2", "a3", "a4"), map(int, marks), strict=True))
        reducer, own = name.partition("-")[0], options.get(name, {})
        write_run(tmp_path / name, reducer, 0.5 * (name != "full"), scores, options=own)
    every = find_runs([tmp_path / name for name in said])
    aim = comparisons(_find(every, "aim", 0.5), every)
    assert (aim.seeds, aim.random.value) == (2, 0.0)
    (merging,) = (r for r in every if r.label == "random merge=True")
    assert comparisons(merging, every).random.value == 0.5
    assert [(loss.label, loss.rival) for loss in losses(every)] == []


def test_random_is_one_row_however_many_seeds_it_has(tmp_path):
    """Of seeds 2 and 10, items a1 to a4 are right 1 0 0 0 and 1 1 1 0; aim has 0 0 0 1.

    Against half of the seeds or more: one won, three lost. Random is one row, right in 2 of 4.
    """
    said = {"full": "1111", "random-10": "1110", "random-2": "1000", "aim": "0001"}
    for name, marks in said.items():
        scores = dict(zip(("a1", "a2", "a3", "a4"), map(int, marks), strict=True))
        reducer, _, seed = name.partition("-")
        options = {"seed": int(seed)} if seed else {}
        write_run(tmp_path / name, reducer, 0.5 * (name != "full"), scores, options=options)
    every = find_runs([tmp_path / name for name in said])
    test = paired_tests(_find(every, "aim", 0.5), every)["against_random"]
    assert (test.wins, test.losses, test.p) == (1, 3, 0.625)
    (loss,) = losses(every)
    assert (loss.accuracy, loss.rival_accuracy) == (0.25, 0.5)
    assert (loss.test.wins, loss.test.losses, loss.test.p) == (1, 3, 0.625)
    _, line, aim = find_lines(every)
    assert (line.label, line.accuracy, line.seeds) == ("random (2 seeds)", 0.5, (0.25, 0.75))
    assert (line.retention.value, aim.comparisons.random.value, aim.comparisons.seeds) == (
        0.5,
        -0.25,
        2,
    )
    assert [r["correct"] for r in line.run.answered] == [1, 0.5, 0.5, 0]


def test_losses_are_the_groups_that_score_lower(runs):
    every, said = runs
    found = {(loss.family, loss.rival) for loss in losses(every)}
    expected = set()
    for group, name in product("ab", ("random", "downscale")):
        tables = (
            [said[k, 0.5] for k in ("random", "random-1")]
            if name == "random"
            else [said[name, 0.5]]
        )
        ids = [i for i in ITEMS if i[0] == group and all(i in table for table in tables)]
        own = sum(said["aim", 0.5][i]["correct"] for i in ids)
        if own < sum(t[i]["correct"] for t in tables for i in ids) / len(tables):
            expected.add((group, name))
    assert found == expected and expected
    assert all(
        loss.label == "aim" and loss.accuracy < loss.rival_accuracy for loss in losses(every)
    )


@pytest.mark.parametrize(
    ("name", "ratio", "layers", "first"),
    [
        ("fastv", 0.75, 6, 0),  # half of the budget would be gone before layer 2
        ("fastv", 0.75, 16, None),
        ("fastv", 0.5, 28, None),
        ("pyramiddrop", 0.75, 16, 1),  # three halvings save too little at any depth
        ("pyramiddrop", 0.5, 16, None),
        ("aim", 0.75, 16, None),
        ("condiv", 0.9, 6, None),
    ],
)
def test_moved_methods_say_so(name, ratio, layers, first):
    note = make_reducer(name).deviation(ratio, layers)
    assert (note == "") is (first is None), note
    if first is not None:
        assert note.startswith(f"cuts before layer {first}")


def test_evs_below_one_frame_says_so():
    """Below one frame the published rule keeps more than was asked for; ours keeps half of one."""
    evs = make_reducer("evs")
    assert (
        not evs.deviation(0.75, 6, 4)
        and not evs.deviation(0.9, 6)
        and not evs.deviation(0.9, 6, 16)
    )
    assert "one of 4 frames" in evs.deviation(0.76, 6, 4)
    both = make_reducer("evs+fastv", share=1.0)
    assert "one of 4 frames" in both.deviation(0.9, 28, 4) and not both.deviation(0.7, 28, 4)
