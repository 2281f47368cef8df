"""What a reducer chooses in a span does not depend on the spans beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import matrix
from support.matrix import Case

from tokencomp import VisualTokens, make_reducer
from tokencomp.errors import PlanError
from tokencomp.plan.reducer import reduced
from tokencomp.reducers import mmtok
from tokencomp.tokens import stacks
from tokencomp.tokens.reduction import Reduction

GRIDS = [((1, 4, 5), 0), ((4, 3, 4), 3), ((1, 4, 5), 2), ((2, 2, 7), 0), ((4, 3, 4), 0)]


def without(tokens: VisualTokens, places: list[int]) -> VisualTokens:
    """A span from which an earlier stage has dropped the patches at `places`."""
    left = torch.ones(len(tokens), dtype=torch.bool)
    left[places] = False
    left |= tokens.special
    names = ("features", "special", "scores", "sizes")
    values: dict[str, Any] = {name: getattr(tokens, name) for name in names}
    values = {name: None if v is None else v[left] for name, v in values.items()}
    values["tower"] = {signal: v[left] for signal, v in tokens.tower.items()}
    same = ("grid", "query", "query_scores", "norm", "modality")
    values |= {name: getattr(tokens, name) for name in same}
    return VisualTokens(index=left.nonzero()[:, 0], **values)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("case", matrix.step_cases(), ids=matrix.case_id)
def test_a_batch_is_its_spans_one_by_one(case: Case, whole: bool) -> None:
    """Images and videos, texts of any length, with and without special and missing tokens."""
    reducer, row = make_reducer(case[0], **case[1]), matrix.row(case[0])
    if not whole and reducer.grid == "whole":
        pytest.skip("acts on whole spans")
    spans = [matrix.tokens(grid, special) for grid, special in GRIDS]
    for number, t in enumerate(spans):
        t.query, t.query_scores = t.query[: number + 1], t.query_scores[: number + 1]
    if not whole:
        spans = [without(t, [3 + i, 7, 11]) for i, t in enumerate(spans)]
    batch, keeps = matrix.joined(spans), [row.keep(9 + i % 2, t) for i, t in enumerate(spans)]
    together = reduced(reducer, batch, keeps)
    for tokens, keep, part in zip(spans, keeps, together.split(batch, keeps), strict=True):
        alone = matrix.reduce(case, tokens, keep)
        assert part.keep.tolist() == alone.keep.tolist()
        if alone.merged is not None:
            torch.testing.assert_close(part.merged, alone.merged, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(part.sizes, alone.sizes)


@pytest.mark.parametrize(
    ("name", "module", "limit", "value"),
    [("visprune", stacks, "PAIRS", 2 * 20**2), ("mmtok", mmtok, "BLOCK", 4 * 20 * 7)],
)
def test_long_spans_are_compared_in_parts(
    name: str, module: Any, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so many patches that all pairs of a call would not fit into memory."""
    reducer, batch = (
        make_reducer(name),
        matrix.joined([matrix.tokens((1, 4, 5), seed=s) for s in range(4)]),
    )
    at_once = reduced(reducer, batch, [7] * 4).keep.tolist()
    monkeypatch.setattr(module, limit, value)
    assert reduced(reducer, batch, [7] * 4).keep.tolist() == at_once


@pytest.mark.parametrize(
    "rows", [[0, 1, 2, 3], [1, 0, 21, 22], [0, 1, 20], [0, 1, 20, 60], [-1, 1, 20, 22]], ids=str
)
def test_wrong_rows_of_a_batch_are_refused(rows: list[int]) -> None:
    """Rows of another span, in another order, too few, or of no span at all."""
    batch = matrix.joined([matrix.tokens((1, 4, 5)), matrix.tokens((1, 4, 5))])
    with pytest.raises(PlanError, match="'wrong' returned"):
        Reduction(torch.tensor(rows)).check_batch(batch, [2, 2], "wrong")


def test_a_batch_without_its_special_tokens_is_refused() -> None:
    batch = matrix.joined([matrix.tokens((1, 4, 5), 2), matrix.tokens((1, 4, 5))])
    patches = (~batch.special).nonzero()[:3, 0]  # type: ignore[operator]
    with pytest.raises(PlanError, match="without 2 of the special tokens"):
        Reduction(torch.cat([patches, torch.tensor([30])])).check_batch(batch, [3, 1], "wrong")


def test_a_subclass_that_overrides_one_span_alone_is_asked_span_by_span() -> None:
    class FirstRows(type(make_reducer("random"))):  # type: ignore[misc]
        def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
            return Reduction(torch.arange(keep))

    spans = [VisualTokens(torch.randn(n, 3), (1, 1, n), torch.zeros(n).bool()) for n in (4, 6)]
    assert reduced(FirstRows(), matrix.joined(spans), [2, 3]).keep.tolist() == [0, 1, 4, 5, 6]


def test_spans_of_which_some_merge() -> None:
    """The others keep the features and sizes that they had."""
    sizes, none = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, dtype=torch.bool)
    tokens = VisualTokens(torch.arange(4.0)[:, None], (1, 1, 4), none, sizes=sizes)
    rows = torch.tensor([1, 3])
    merging = Reduction(rows, torch.tensor([[7.0], [8.0]]), torch.tensor([3.0, 7.0]))
    joined = Reduction.join([Reduction(rows), merging], matrix.joined([tokens, tokens]))
    assert joined.keep.tolist() == [1, 3, 5, 7]
    assert joined.merged.flatten().tolist() == [1.0, 3.0, 7.0, 8.0]
    assert joined.sizes.tolist() == [2.0, 4.0, 3.0, 7.0]
