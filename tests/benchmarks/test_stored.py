"""Results that were stored under earlier names are read under those of today."""

from __future__ import annotations

import pytest

from benchmarks.stored import today
from tokencomp.evaluation.settings import Setting


@pytest.mark.parametrize(
    ("label", "setting"),
    [
        ("kcentre-0.75-rest=merge", Setting("kcenter", 0.75, {"merge": True})),
        ("merge-0.5", Setting("bipartite", 0.5)),
        ("auto-0.9-rest=drop", Setting("auto", 0.9, {"merge": False})),
        (
            "selector-0.5-pick=mmr-rest=merge",
            Setting("selector", 0.5, {"pick": "mmr", "merge": True}),
        ),
        ("uniform-0.5-rest=auto", Setting("uniform", 0.5, {"merge": "auto"})),
    ],
)
def test_labels_are_those_of_the_same_settings(label: str, setting: Setting) -> None:
    assert today(label) == setting.label
    assert today(setting.label) == setting.label


def test_results_of_both_times() -> None:
    """`merge` is a reducer in older files and an option in newer ones; commands stay."""
    stored = {
        "reducer": "merge", "options": {"pick": "mmr", "rest": "drop"}, "rest": 0.25,
        "environment": {"command": "run.py --reducers kcentre"},
        "rows": ["scope rest=merge saliency=none at 0.9"],
    }  # fmt: skip
    assert today(stored) == {
        **stored, "reducer": "bipartite", "options": {"pick": "mmr", "merge": False},
        "rows": ["scope merge=True saliency=none at 0.9"],
    }  # fmt: skip
    new = {"reducer": "auto", "merge": False}
    assert today([new, {"merge": 0.5}]) == [new, {"bipartite": 0.5}]
