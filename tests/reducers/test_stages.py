"""What the hooks make of reducers: spans apart, stages after stages, counts that are held."""

from __future__ import annotations

import contextlib
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
class Short(Reducer):
    """Returns fewer rows than its budget, or fewer merged ones."""

    rows: int = 0
    merged: int = 0

    def reduce(self, tokens: Tokens) -> Kept:
        rows = torch.arange(tokens.budgets[0] - self.rows)
        return Kept(rows, tokens.features[rows][: len(rows) - self.merged])


@dataclass(frozen=True)
class Wrong(Reducer):
    """Returns the right number of rows, but not rows as they should be."""

    how: str = ""

    def reduce(self, tokens: Tokens) -> Kept:
        first = torch.arange(tokens.budgets[0])
        return {
            "twice": Kept(torch.zeros_like(first)),
            "falling": Kept(first.flip(0)),
            "before": Kept(first - 1),
            "behind": Kept(first + tokens.lengths[0]),
            "floats": Kept(first.float()),
            "nothing": None,
        }[self.how]


def test_wrong_rows_are_refused() -> None:
    family = FAMILIES["llava_onevision"]
    model = family.build()
    inputs = family.batch([[text(3), family.video(4), text(4)]])
    for how, message in (
        ("twice", "not ascending"),
        ("falling", "not ascending"),
        ("before", "rows -1 … "),
        ("behind", "rows 16 … 23 of 16"),
        ("floats", "type torch.float32"),
        ("nothing", "returned a NoneType"),
    ):
        with (
            tokencomp.patch(model, plan=Plan((Stage(0, 0.5, Wrong(how=how)),))),
            pytest.raises(PlanError, match=f"'Wrong' .*{message}"),
        ):
            model(**inputs)


@pytest.mark.parametrize(("layer", "reducer"), [(0, Short(rows=1)), (2, Short(merged=1))])
def test_another_number_of_rows_is_refused(reducer: Reducer, layer: int) -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(4)]])
    with (
        tokencomp.patch(model, plan=Plan((Stage(layer, 0.5, reducer),))),
        pytest.raises(PlanError, match=r"'Short' returned 7 (rows|features) where 8 were"),
    ):
        model(**inputs)
