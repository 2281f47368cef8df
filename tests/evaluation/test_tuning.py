"""The search of `tokencomp tune` against a plain enumeration."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from support.console import run

from tokencomp.evaluation import Setting, tuning
from tokencomp.evaluation.tuning import Candidate, candidates, pareto

GRID = {"frames": [4, 8], "scales": [1.0, 0.5], "reducers": [("uniform", {})], "ratios": [0.5]}


def test_candidates_are_all_that_fit(loaded, examples):
    """Videos: 64 tokens per frame pair at full size, 16 at half size."""
    videos = [e for e in examples if e.media[0].suffix == ".mp4"]
    found = candidates(*loaded, videos, **GRID, tokens=64)
    expected = set()
    for frames, scale in itertools.product([4, 8], [1.0, 0.5]):
        full = frames // 2 * (64 if scale == 1 else 16)
        for ratio in {0.0, 0.5, max(0.0, 1 - 64 / full)}:
            if full * (1 - ratio) <= 64:
                expected.add((frames, scale, "full" if ratio == 0 else "uniform", ratio))
    assert {(c.frames, c.scale, c.setting.name, c.setting.ratio) for c in found} == expected


def test_the_tower_drops_no_more_than_the_whole(loaded, examples):
    """Ratios below the tower's are left out; the same ratio is none of them."""
    videos, ratios = [e for e in examples if e.media[0].suffix == ".mp4"], [0.25, 0.5, 0.75]
    grid = {**GRID, "frames": [4], "scales": [1.0], "ratios": ratios}
    found = candidates(*loaded, videos, **grid, tokens=1000, options={"tower_ratio": 0.5})
    assert [c.setting.ratio for c in found] == [0.0, 0.5, 0.75]


@pytest.mark.parametrize("order", ["alternating", "images first", "long"])
def test_budgets_count_all_items_of_the_file(loaded, examples, order):
    """An image of 64 tokens and a clip of 8 frames with 256: (64 + 256) / 2 = 160 per item."""
    image, clip = examples[0], examples[-1]
    more = {"alternating": [image, clip] * 8, "images first": [image] * 8 + [clip] * 8}
    items = more.get(order, [*[image] * 11, *[clip] * 11])
    grid = {**GRID, "frames": [8], "scales": [1.0], "ratios": [0.5, 0.75]}
    assert [c.tokens for c in candidates(*loaded, items, **grid, tokens=1000)] == [160, 80, 40]
    found = candidates(*loaded, items, **grid, tokens=70)
    assert [(c.setting.ratio, c.tokens) for c in found] == [(0.5625, 70.0), (0.75, 40.0)]


def test_measured_tokens_are_within_the_budget():
    """64 × 1.005 = 64.32: what whole tokens add, and no more."""
    given = [Candidate(8, 1.0, Setting(), tokens) for tokens in (64.0, 64.32, 64.4, 160.0)]
    assert tuning.within(given, 64) == given[:2]


def test_pareto_front_by_brute_force():
    rng = random.Random(0)
    points = [
        Candidate(
            8, 1.0, Setting("uniform", k / 100), rng.randrange(20), 0.0, rng.randrange(10) / 10, 3
        )
        for k in range(60)
    ]

    def beaten(c, d):
        better = d.accuracy > c.accuracy or d.tokens < c.tokens
        return d.accuracy >= c.accuracy and d.tokens <= c.tokens and better

    best = {(c.tokens, c.accuracy) for c in points if not any(beaten(c, d) for d in points)}
    refused = Candidate(1, 1.0, Setting("uniform", 0.5))  # answered nothing
    assert {(c.tokens, c.accuracy) for c in pareto([refused, *points])} == best


def test_tune_stays_within_the_budget(folder, examples, tmp_path, capsys):
    file = tmp_path / "questions.jsonl"
    rows = [{"question": e.prompt, "answer": e.answer, "media": str(e.media[0])} for e in examples]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune = (
        "tune", "--tokens", 64, "--model", folder, "--data", file, "--frames", "4",
        "--scale", "1,0.5", "-r", "uniform", "--ratio", "0.5", "--max-new-tokens", 5,
    )  # fmt: skip
    assert run(*tune) == 0 and "Pareto front" in capsys.readouterr().out
    assert run(*tune, "--json") == 0
    stored = json.loads(capsys.readouterr().out)
    assert stored["max_new_tokens"] == 5
    assert stored["candidates"] and all(c["tokens"] <= 64 for c in stored["candidates"])
    assert any(c["pareto"] for c in stored["candidates"])
