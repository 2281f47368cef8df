"""What a reducer chooses in a span depends on that span alone, by itself and in a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import matrix, merge_loops
from support.families import FAMILIES, Family, text
from support.matrix import Case

import tokencomp
from tokencomp import Kept, Plan, Reducer, Stage, Tokens, make_reducer
from tokencomp.errors import PlanError
from tokencomp.kernels import KernelError, maxmin_select
from tokencomp.plan.options import Traits
from tokencomp.reducers import ScoreReducer, mmtok
from tokencomp.reducers._batch import means
from tokencomp.reducers.base import reduced
from tokencomp.tokens import stacks

GRIDS = [(1, 4, 5), (4, 3, 4), (1, 4, 5), (2, 2, 7), (4, 3, 4)]


def without(tokens: Tokens, places: list[int]) -> Tokens:
    """A span from which an earlier stage has dropped the patches at `places`."""
    left = torch.ones(tokens.lengths[0], dtype=torch.bool)
    left[places] = False
    return dataclasses.replace(
        tokens,
        features=tokens.features[left],
        scores=tokens.scores[left],
        tower={signal: values[left] for signal, values in tokens.tower.items()},
        lengths=[int(left.sum())],
        index=left.nonzero()[:, 0],
    )


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("case", matrix.step_cases(), ids=matrix.case_id)
def test_a_batch_is_its_spans_one_by_one(case: Case, whole: bool) -> None:
    """Images and videos, texts of any length, with and without missing tokens."""
    row = matrix.row(case[0])
    if not whole and make_reducer(case[0], **case[1]).traits.grid == "whole":
        pytest.skip("acts on whole spans")
    spans = [matrix.tokens(grid) for grid in GRIDS]
    for number, t in enumerate(spans):
        t.queries = [t.queries[0][: number + 1]]
        t.query_scores = [t.query_scores[0][: number + 1]]
    if not whole:
        spans = [without(t, [3 + i, 7, 11]) for i, t in enumerate(spans)]
    budgets = [row.keep(7 + i % 2) for i in range(len(spans))]
    together = matrix.reduce(case, matrix.joined(spans), *budgets)
    parts = [matrix.reduce(case, t, k) for t, k in zip(spans, budgets, strict=True)]
    alone = Kept.joined(parts, matrix.joined(spans, *budgets))
    assert together.patches.tolist() == alone.patches.tolist()
    if alone.features is not None:
        torch.testing.assert_close(together.features, alone.features, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(together.weights, alone.weights)


def test_iterating_gives_the_spans() -> None:
    """With all that belongs to each, as views."""
    spans = [without(matrix.tokens(grid, seed=i), [2]) for i, grid in enumerate(GRIDS)]
    for one, same in zip(matrix.joined(spans), spans, strict=True):
        for name in ("grids", "lengths", "modalities"):
            assert getattr(one, name) == getattr(same, name)
        for name in ("features", "index", "scores", "queries", "query_scores", "tower"):
            torch.testing.assert_close(getattr(one, name), getattr(same, name))


@pytest.mark.parametrize(
    ("name", "module", "limit", "value"),
    [("visprune", stacks, "PAIRS", 2 * 20**2), ("mmtok", mmtok, "BLOCK", 4 * 20 * 7)],
)
def test_long_spans_are_compared_in_parts(
    name: str, module: Any, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so many patches that all pairs of a call would not fit into memory."""
    reducer = make_reducer(name)
    tokens = matrix.joined([matrix.tokens((1, 4, 5), seed=s) for s in range(4)])
    at_once = matrix.kept(reducer, tokens, *[7] * 4).patches.tolist()
    monkeypatch.setattr(module, limit, value)
    assert matrix.kept(reducer, tokens, *[7] * 4).patches.tolist() == at_once


@pytest.mark.parametrize(
    "patches",
    [[0, 1, 2, 3], [1, 0, 21, 22], [0, 0, 20, 21], [0, 1, 20], [0, 1, 20, 60], [-1, 1, 20, 22]],
    ids=str,
)
def test_wrong_patches_of_a_batch_are_refused(patches: list[int]) -> None:
    """Rows of another span, in another order, one of them twice, too few, or of no span at all."""

    class TheseRows(type(make_reducer("uniform"))):  # type: ignore[misc]
        traits = Traits(batched=True)

        def reduce(self, tokens: Tokens) -> Kept:
            return Kept(torch.tensor(patches))

    tokens = matrix.joined([matrix.tokens((1, 4, 5)), matrix.tokens((1, 4, 5))], 2, 2)
    with pytest.raises(PlanError, match="'uniform' returned"):
        reduced(TheseRows(), tokens)


def test_a_subclass_that_chooses_anew_is_asked_span_by_span() -> None:
    """Unless it says that it sees all spans at once."""

    class FirstRows(type(make_reducer("random"))):  # type: ignore[misc]
        def reduce(self, tokens: Tokens) -> Kept:
            starts, budgets = tokens.starts, tokens.budgets
            parts = [torch.arange(k) + at for at, k in zip(starts, budgets, strict=True)]
            return Kept(torch.cat(parts) + 10 * (len(tokens) - 1))

    class AllRows(FirstRows):
        traits = Traits(batched=True)

    tokens = Tokens(torch.randn(30, 3), [(1, 1, 10), (1, 1, 20)], [2, 3])
    assert reduced(FirstRows(), tokens).patches.tolist() == [0, 1, 10, 11, 12]
    with pytest.raises(PlanError, match="0 patches of a span where 2 were requested"):
        reduced(AllRows(), tokens)


@dataclass(frozen=True)
class Farthest(Reducer):
    """It leaves the check of features to the kernel that it calls."""

    def reduce(self, tokens: Tokens) -> Kept:
        return Kept(maxmin_select(tokens.features, tokens.budgets))


def test_kernels_check_features_that_a_reducer_has_not() -> None:
    """A vision tower overflows, as some do in float16."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch([[text(2), family.image(0), text(3)]])

    def overflow(_: Any, inputs: Any, output: Any) -> None:
        output.pooler_output[:1] = torch.nan

    model.model.visual.register_forward_hook(overflow)
    refused = pytest.raises(KernelError, match="NaN or infinite features")
    with torch.no_grad(), tokencomp.patch(model, plan=Plan((Stage(0, 0.5, Farthest()),))), refused:
        model(**inputs)


def test_spans_of_which_some_merge() -> None:
    """The others keep the features and weights that they had."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(2)
    tokens = Tokens(torch.arange(8.0)[:, None], [(1, 1, 4)] * 2, [2, 2], weights=weights)
    rows = torch.tensor([1, 3])
    merging = Kept(rows, torch.tensor([[7.0], [8.0]]), torch.tensor([3.0, 7.0]))
    joined = Kept.joined([Kept(rows), merging], tokens)
    assert joined.patches.tolist() == [1, 3, 5, 7]
    assert joined.features.flatten().tolist() == [1.0, 3.0, 7.0, 8.0]
    assert joined.weights.tolist() == [2.0, 4.0, 3.0, 7.0]


@pytest.mark.parametrize("lengths", [[1], [5], [16, 17, 1], [300, 2, 256]])
def test_means_of_texts(lengths: list[int]) -> None:
    """Against a loop; bit by bit for texts alone, so that no choice depends on other prompts."""
    x = torch.randn(sum(lengths), 24)
    texts, together = x.split(lengths), means(x, lengths)
    want = torch.stack([text.double().mean(0).float() for text in texts])
    torch.testing.assert_close(together, want, atol=1e-6, rtol=1e-5)
    assert torch.equal(together, torch.cat([means(text, [len(text)]) for text in texts]))


@contextlib.contextmanager
def layer_input(model: Any, family: Family, layer: int) -> Iterator[list[torch.Tensor]]:
    """Collects what decoder layer `layer` gets, (n, d) of sample 0, after the hooks of patch()."""
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    hook = family.decoder(model).layers[layer].register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def on_features(case: Case) -> bool:
    """Whether a case sees nothing but a span's features, at entry."""
    made = make_reducer(case[0], **case[1])
    return not made.needs and [s.layer for s in made.plan(0.5, 28).stages] == [0]


@pytest.mark.parametrize("case", filter(on_features, matrix.cases()), ids=matrix.case_id)
def test_spans_of_one_prompt_do_not_mix(case: Case) -> None:
    """Layer 0 of a prompt gets what it gets of the prompt's halves, one after the other."""
    names = ("qwen2_vl", "llava_onevision", "vila")
    family = FAMILIES[names[matrix.cases().index(case) % 3]]
    model, first, second = family.build(), family.image(1), family.video(4)
    halves = [[text(3), first, text(4, 2)], [second, text(5, 3)]]
    case, found = matrix.on_model(case, model), []
    with (
        tokencomp.patch(model, 0.6, reducer=case[0], **case[1]),
        layer_input(model, family, 0) as seen,
        torch.no_grad(),
    ):
        for row in [[*halves[0], *halves[1]], *halves]:
            inputs = family.batch([row])
            model(**inputs, logits_to_keep=1)
            found.append(seen[-1])
    torch.testing.assert_close(found[0], torch.cat(found[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("qwen2_vl", "vidcom2"),
        ("qwen3_vl", "divprune"),
        ("llava_onevision", "evs"),
        ("vila", "evs"),
    ],
)
def test_merging_after_another_stage(name: str, first: str) -> None:
    """Tokens merge inside their frames, whatever stands between these, to the planned count."""
    family = FAMILIES[name]
    model, layer = family.build(), family.layers - 1
    inputs = family.batch([[text(3), family.video(8), text(9, 3)]])
    entry, merging = (
        Stage(0, 0.5, make_reducer(first)),
        Stage(layer, 0.3, make_reducer("bipartite")),
    )
    found = []
    for plan in (Plan((entry,)), Plan((entry, merging))):
        with (
            tokencomp.patch(model, plan=plan) as handle,
            layer_input(model, family, layer) as seen,
            torch.no_grad(),
        ):
            model(**inputs, logits_to_keep=1)
        found += seen
    (span,), ((live,), (kept,)) = handle.stats.spans[0], handle.stats.kept(0)
    others = {*span.special, *span.text}
    frame = merge_loops.patches_of(span.length, others, span.grid)
    before, after = (x[span.start :][: len(o)] for x, o in zip(found, (live, kept), strict=True))
    budget = handle.stats.counts[0][0][1] - len(span.special)
    expected = merge_loops.merge(merge_loops.rows_of(before, live, frame), budget)
    assert kept == sorted([*others, *(row.place for row in expected)])
    wanted = torch.tensor([row.x for row in expected])
    patches = after[[i for i, o in enumerate(kept) if o in frame]]
    torch.testing.assert_close(patches, wanted, atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class Returning(Reducer):
    """Returns what `kept(features, budget)` makes."""

    kept: Any

    def reduce(self, tokens: Tokens) -> Kept:
        return self.kept(tokens.features, tokens.budgets[0])


@dataclass(frozen=True)
class Scoring(ScoreReducer):
    """Scores patches by `rated(features)`."""

    rated: Any

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return self.rated(tokens.features)


R = torch.arange
WRONG = {
    r"'Returning' returned patches of shape \(7,\).*\(8,\)": Returning(lambda x, k: Kept(R(k - 1))),
    "'Returning' returned a list": Returning(lambda x, k: [*range(k)]),
    "'Returning' returned patches of type list": Returning(lambda x, k: Kept([*range(k)])),
    r"features of shape \(7, 64\).*\(8, 64\)": Returning(lambda x, k: Kept(R(k), x[1:k])),
    r"features of shape \(8, 3\).*\(8, 64\)": Returning(lambda x, k: Kept(R(k), x[:k, :3])),
    r"weights of shape \(8, 1\).*\(8,\)": Returning(lambda x, k: Kept(R(k), x[:k], x[:k, :1])),
    r"'Scoring' returned scores of shape \(16, 64\).*\(16,\)": Scoring(lambda x: x),
    r"'Scoring' returned scores of shape \(15,\).*\(16,\)": Scoring(lambda x: x[1:, 0]),
}


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_shape_is_refused(message: str, layer: int) -> None:
    """The message names the reducer, what it returned, and the shape that is expected."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(4)]])
    with (
        tokencomp.patch(model, plan=Plan((Stage(layer, 0.5, WRONG[message]),))),
        pytest.raises(PlanError, match=message),
    ):
        model(**inputs)


def test_the_old_name_of_kept_patches_still_works() -> None:
    kept = Kept(torch.tensor([1, 3]))
    with pytest.warns(DeprecationWarning, match=r"Kept\.patches"):
        assert kept.rows is kept.patches
