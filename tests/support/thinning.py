"""Which cases of a test with many parameters plain pytest runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def thin_out(items: Sequence[pytest.Item]) -> None:
    """Mark as long all but one case in n of a test with the mark `thin(n)`.

    It is for tests of two parameters or more that share their code. A case has the number that the
    indices of its values add up to, so that every value of every parameter runs in plain pytest.
    Families that are long already are counted apart:

        thin(2)              sdpa   eager
        qwen2_vl               0      1      0: plain pytest, 1: -m long
        llava_onevision        1      0
    """
    known: dict[tuple[object, ...], list[dict[str, int]]] = {}
    for item in items:
        mark = item.get_closest_marker("thin")
        if mark is None:
            continue
        assert isinstance(item, pytest.Function)
        test = item.parent, item.originalname, item.get_closest_marker("long") is None
        values = item.callspec._idlist
        numbers = known.setdefault(test, [{} for _ in values])
        pairs = zip(numbers, values, strict=True)
        if sum(seen.setdefault(value, len(seen)) for seen, value in pairs) % mark.args[0]:
            item.add_marker("long")
