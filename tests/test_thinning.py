"""Thinned tests: a share of the cases, in which every value of every parameter occurs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from support.thinning import thin_out


class Case(pytest.Function):
    """A case of a test, without what would run it."""

    def __init__(self, marks: dict[str, Any], *values: str) -> None:
        self.marks, self.values = marks, values
        self.parent, self.originalname = None, "test"
        self.callspec = SimpleNamespace(_idlist=values)

    @classmethod
    def made(cls, marks: dict[str, Any], *values: str) -> Case:
        """As pytest nodes refuse to be made outside of a collection."""
        case = cls.__new__(cls)
        case.__init__(marks, *values)
        return case

    def get_closest_marker(self, name: str) -> Any:
        return self.marks.get(name)


FAMILIES, PLANS, BACKENDS = ("x", "y", "z"), ("a", "b", "c", "d"), ("sdpa", "eager")


@pytest.mark.parametrize("share", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(FAMILIES, PLANS), (FAMILIES, PLANS, BACKENDS)], ids=len)
def test_every_value_of_every_parameter_runs(
    sizes: tuple[tuple[str, ...], ...], share: int
) -> None:
    mark = pytest.mark.thin(share).mark
    cases = [Case.made({"thin": mark}, *values) for values in itertools.product(*sizes)]
    kept = [case.values for case in thin_out(cases)]
    assert len(kept) == len(cases) // share
    assert [set(column) for column in zip(*kept, strict=True)] == [set(size) for size in sizes]
