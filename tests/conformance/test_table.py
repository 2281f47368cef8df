"""The support table: pages, counts and the list come from the kept results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.conformance.table import markdown, worse
from tokencomp.adapters.verified import load, nearest, releases, verified_types
from tokencomp.conformance.checks import SCORED, TOLERANCE

REPOSITORY = Path(__file__).parents[2]
NEWEST = releases()[-1]


@pytest.mark.parametrize("release", releases())
def test_pages_are_those_of_the_results(release: str) -> None:
    page = REPOSITORY / "docs" / "conformance" / f"transformers-{release}.md"
    assert page.read_text(encoding="utf-8") == markdown(load(release))


def test_measured_errors_are_below_the_tolerance() -> None:
    for release in releases():
        table = load(release)
        for name, row in table["types"].items():
            if row["status"] not in ("exact", "entry only"):
                continue
            errors = row["errors"]
            assert errors["identity"] == 0 and errors["effect"] >= table["least_effect"], name
            assert max(errors["entry"], errors["entry decode"]) <= table["tolerance"], name


def test_verified_types_follow_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "9.0.0")
    assert {"qwen2_vl", "mistral3"} <= verified_types()
    assert nearest("9.0.0") == NEWEST
    assert nearest("5.6.0") == releases()[0]


def test_a_type_that_does_worse_is_named() -> None:
    table = load(NEWEST)
    assert worse(table) == {}
    row: dict[str, Any] = {**table["types"]["llava"], "status": "unverified", "reason": "broken"}
    changed = {**table, "types": {**table["types"], "llava": row}}
    assert list(worse(changed)) == ["llava"]


def test_every_exact_type_shows_or_refuses_reducers_that_read_attention() -> None:
    for name, row in load(NEWEST)["types"].items():
        if row["status"] == "exact":
            assert {*SCORED} <= {*row["errors"], *row.get("refusals", {})}, name
            assert all(row["errors"].get(r, 0) <= TOLERANCE for r in SCORED), name
