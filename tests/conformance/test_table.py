"""The support table: pages, counts and the list come from the kept results."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.conformance.table import worse
from tokencomp.adapters.verified import load, nearest, releases, verified_types

NEWEST = releases()[-1]


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
