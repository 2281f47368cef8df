"""Where `merge=True` is refused, by name; a refused change leaves the patch as it was."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from support import matrix
from support.families import FAMILIES, text

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.engine import weights
from tokencomp.errors import MergeWarning, OptionError, UnsupportedModelError

MERGERS = [c for c in matrix.cases() if make_reducer(c[0], **c[1]).merges]
FAMILY = FAMILIES["qwen2_vl"]


def prompt() -> dict[str, Any]:
    """One image between words."""
    torch.manual_seed(7)
    return FAMILY.batch([[text(3), FAMILY.image(0), text(9, 3)]])


@pytest.mark.parametrize("case", MERGERS, ids=matrix.case_id)
def test_reducers_that_merge_by_themselves_are_refused(case: matrix.Case) -> None:
    with pytest.raises(OptionError, match=r"merge=True: .* merges tokens by itself"):
        tokencomp.patch(FAMILY.build(), 0.5, reducer=case[0], merge=True, **case[1])


def test_attention_that_takes_no_weights() -> None:
    """As of remote code: merging is refused, and the default drops and says so, once."""
    weights._warn_once.cache_clear()
    model, inputs = FAMILY.build("sdpa"), prompt()
    attention = FAMILY.decoder(model).layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with (
        tokencomp.patch(model, 0.8, reducer="kcenter", merge=True),
        pytest.raises(UnsupportedModelError, match=r"layers \[1\] of .* not asked"),
    ):
        model(**inputs)
    with tokencomp.patch(model, 0.8, merge=False):
        expected = model(**inputs).logits
    with pytest.warns(MergeWarning, match=r"drops here\. .* not reach the attention of"):
        handle = tokencomp.patch(model, 0.8)
    assert torch.equal(model(**inputs).logits, expected)
    assert handle.stats.merged_from is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokencomp.patch(model, 0.8)


def test_refused() -> None:
    """By name; a refused change leaves the patch as it was."""
    compact = tokencomp.patch(FAMILIES["internvl"].build(), 0.5, positions="compact")
    with pytest.raises(OptionError, match="merge=True with positions='compact'"):
        compact.set(reducer="kcenter", merge=True)
    assert not compact.plan.may_merge
    model, uniform = FAMILY.build(), make_reducer("uniform")
    with pytest.raises(OptionError, match="merge='keep'; allowed: True, False, 'auto'"):
        tokencomp.patch(model, 0.5, merge="keep")
    with pytest.raises(OptionError, match=r"merge=True.*a plan names its reducers"):
        tokencomp.patch(model, plan=Plan((Stage(0, 0.5, uniform),)), merge=True)
    with pytest.raises(OptionError, match="merge=True beside 'bipartite', which merges"):
        Plan((Stage(0, 0.5, make_reducer("bipartite")), Stage(2, 0.2, uniform, merge=True)))
    handle = tokencomp.patch(model, 0.8, reducer="kcenter", merge=True)
    with pytest.raises(OptionError, match="merge=True: 'pool' merges tokens by itself"):
        handle.set(reducer="pool")
    assert handle.plan.entry.reducer.name == "kcenter" and handle.plan.may_merge
    assert not handle.set(reducer="pool", merge=False).plan.may_merge


def test_a_reducer_that_merges_without_saying_so() -> None:
    @dataclasses.dataclass(frozen=True)
    class Silent(tokencomp.Reducer):
        name = "silent"

        def reduce(self, tokens: Any, keep: int) -> tokencomp.Reduction:
            rows = torch.arange(keep)
            return tokencomp.Reduction(rows, tokens.features[rows] * 2)

    model = FAMILY.build()
    own = pytest.raises(OptionError, match="'silent' returns features or sizes of its own")
    with tokencomp.patch(model, 0.5, reducer=Silent(), merge=True), own:
        model(**prompt())
