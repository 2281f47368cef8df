"""Where `rest="merge"` is refused, by name; a refused change leaves the patch as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import matrix
from support.families import FAMILIES, text

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.errors import OptionError, RestWarning, UnsupportedModelError

MERGERS = [c for c in matrix.cases() if make_reducer(c[0], **c[1]).merges]
FAMILY = FAMILIES["qwen2_vl"]


def prompt() -> dict[str, Any]:
    """One image between words."""
    torch.manual_seed(7)
    return FAMILY.batch([[text(3), FAMILY.image(0), text(9, 3)]])


@pytest.mark.parametrize("case", MERGERS, ids=matrix.case_id)
def test_reducers_that_merge_by_themselves_are_refused(case: matrix.Case) -> None:
    with pytest.raises(OptionError, match=r"rest='merge': .* merges tokens by itself"):
        tokencomp.patch(FAMILY.build(), 0.5, reducer=case[0], rest="merge", **case[1])


def test_attention_that_takes_no_weights() -> None:
    """As of remote code: merging is refused, and the default drops and says so."""
    model, inputs = FAMILY.build("sdpa"), prompt()
    attention = FAMILY.decoder(model).layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with (
        tokencomp.patch(model, 0.8, reducer="kcentre", rest="merge"),
        pytest.raises(UnsupportedModelError, match=r"layers \[1\] of .* not asked"),
    ):
        model(**inputs)
    with tokencomp.patch(model, 0.8, rest="drop"):
        expected = model(**inputs).logits
    with pytest.warns(RestWarning, match=r"drops here\. .* not reach the attention of"):
        handle = tokencomp.patch(model, 0.8)
    assert torch.equal(model(**inputs).logits, expected)
    assert handle.stats.merged_from is None


def test_refused() -> None:
    """By name; a refused change leaves the patch as it was."""
    compact = tokencomp.patch(FAMILIES["internvl"].build(), 0.5, positions="compact")
    with pytest.raises(OptionError, match="rest='merge' with positions='compact'"):
        compact.set(reducer="kcentre", rest="merge")
    assert not compact.plan.merges_rest
    model, uniform = FAMILY.build(), make_reducer("uniform")
    with pytest.raises(OptionError, match="rest='keep'; allowed: 'drop', 'merge', 'auto'"):
        tokencomp.patch(model, 0.5, rest="keep")
    with pytest.raises(OptionError, match=r"rest='merge'.*a plan names its reducers"):
        tokencomp.patch(model, plan=Plan((Stage(0, 0.5, uniform),)), rest="merge")
    with pytest.raises(OptionError, match="rest='merge' beside 'merge', which merges"):
        Plan((Stage(0, 0.5, make_reducer("merge")), Stage(2, 0.2, uniform, rest="merge")))
    handle = tokencomp.patch(model, 0.8, reducer="kcentre", rest="merge")
    with pytest.raises(OptionError, match="rest='merge': 'pool' merges tokens by itself"):
        handle.set(reducer="pool")
    assert handle.plan.entry.reducer.name == "kcentre" and handle.plan.merges_rest
    assert not handle.set(reducer="pool", rest="drop").plan.merges_rest


def test_a_reducer_that_merges_without_saying_so() -> None:
    @dataclasses.dataclass(frozen=True)
    class Silent(tokencomp.Reducer):
        name = "silent"

        def reduce(self, tokens: Any, keep: int) -> tokencomp.Reduction:
            rows = torch.arange(keep)
            return tokencomp.Reduction(rows, tokens.features[rows] * 2)

    model = FAMILY.build()
    own = pytest.raises(OptionError, match="'silent' returns features or sizes of its own")
    with tokencomp.patch(model, 0.5, reducer=Silent(), rest="merge"), own:
        model(**prompt())
