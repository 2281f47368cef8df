"""Which cases of a test with many parameters exist."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def thin_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The items without those that `thin(n)` leaves out: of such a test one case in n exists.

    It is for tests of two parameters or more that share their code. A case has the number that the
    indices of its values add up to, so that every value of every parameter runs with some values of
    the others. Cases of plain pytest and those marked long are counted apart.
    """
    known: dict[tuple[object, ...], list[dict[str, int]]] = {}
    kept = []
    for item in items:
        mark = item.get_closest_marker("thin")
        if mark is not None:
            assert isinstance(item, pytest.Function)
            test = item.parent, item.originalname, item.get_closest_marker("long") is None
            values = item.callspec._idlist
            numbers = known.setdefault(test, [{} for _ in values])
            pairs = zip(numbers, values, strict=True)
            if sum(seen.setdefault(value, len(seen)) for seen, value in pairs) % mark.args[0]:
                continue
        kept.append(item)
    return kept
