"""Which cases of a test with many parameters plain pytest runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def thin_out(items: Sequence[pytest.Item]) -> None:
    """Of a test marked `thin(n)` plain pytest runs one case in n, and -m long the others.

    It is for tests of two parameters or more that share their code. A case has the number that the
    places of its values add up to, so that every value of every parameter runs with some values of
    the others. Those that become long are marked `thinned` as well.
    """
    tests: dict[tuple[object, str], list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("thin") and not item.get_closest_marker("long"):
            assert isinstance(item, pytest.Function)
            tests.setdefault((item.parent, item.originalname), []).append(item)
    for cases in tests.values():
        places: list[dict[str, int]] = []  # of the values of each `parametrize`
        for case in cases:
            values = case.callspec._idlist
            places = places or [{} for _ in values]
            pairs = zip(places, values, strict=True)
            number = sum(known.setdefault(value, len(known)) for known, value in pairs)
            if number % case.get_closest_marker("thin").args[0]:
                case.add_marker(pytest.mark.long)
                case.add_marker(pytest.mark.thinned)
