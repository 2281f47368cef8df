"""Reference sliding attention: the prompt is seen for good, and a window of what follows.

The oracle is the full-length run without a cache, whose masks are written from the rule.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import backends, oracle
from support.backends import FLASH, FLEX
from support.families import IMAGE, text
from support.family.reference import WINDOW, UnlimitedOcr

import tokencomp
from tokencomp.adapters.verified import verified_types
from tokencomp.errors import UnsupportedCacheError, UnsupportedModelError

FAMILY = UnlimitedOcr()
STEPS = 3 * WINDOW
UNIFORM = tokencomp.make_reducer("uniform")
PLANS = {
    "entry": tokencomp.Plan((tokencomp.Stage(0, 0.4, UNIFORM),)),
    "layers": tokencomp.Plan((tokencomp.Stage(0, 0.6, UNIFORM), tokencomp.Stage(2, 0.3, UNIFORM))),
}
pytestmark = pytest.mark.skipif(
    FAMILY.name not in verified_types(), reason="the release has no such model"
)


@pytest.fixture(params=["sdpa", "eager", FLASH, FLEX])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    backends.install(monkeypatch, request.param)
    return request.param


def rows() -> list[list[Any]]:
    """Two images, one image, and text alone, of different lengths."""
    torch.manual_seed(7)
    return [
        [text(3), FAMILY.image(), text(2, 2), FAMILY.image(), text(5, 3)],
        [text(4, 4), FAMILY.image(), text(4, 5)],
        [text(9, 6)],
    ]


def expected_logits(
    model: Any, inputs: dict[str, Any], left: list[torch.Tensor], new: torch.Tensor
) -> torch.Tensor:
    """Logits (B, L + T, V) over the prompt and T further tokens; `left` are columns by layer."""
    prompt, total = inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] + new.shape[1]
    query, key = torch.arange(total)[:, None], torch.arange(total)
    rule = (key <= query) & ((key < prompt) | (key > query - WINDOW))
    masks = [rule & torch.cat([mask, torch.ones_like(new).bool()], 1)[:, None] for mask in left]
    full = oracle.continued(inputs, FAMILY.positions(model, inputs), new)
    return oracle.run_masked(model, FAMILY, full, masks)


def generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    return oracle.generate(model, inputs, STEPS, suppress_tokens=[IMAGE], **kwargs)


@pytest.mark.parametrize("name", PLANS)
def test_prefill_and_decode(name: str, backend: str) -> None:
    """A ragged batch, and more words than the window holds."""
    model, inputs = FAMILY.build(backend), FAMILY.batch(rows())
    width = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, plan=PLANS[name]) as handle:
        out = generate(model, inputs)
        left = oracle.kept_columns(handle, inputs, FAMILY.layers)
    assert sum(int(mask.sum()) for mask in left) < FAMILY.layers * int(left[0].sum()) + 1
    assert int(left[0].sum()) < int(inputs["attention_mask"].sum())
    model.set_attn_implementation("sdpa")
    expected = expected_logits(model, inputs, left, out.sequences[:, width:-1])
    assert (torch.stack(out.logits, 1) - expected[:, width - 1 :]).abs().max() < 5e-5


def test_a_second_turn(backend: str) -> None:
    """Several words at once on the cache of the first turn; media there are refused.

    FlashAttention is refused there, which could not hide what each of the words must not see.
    """
    model, inputs = FAMILY.build(backend), FAMILY.batch(rows())
    width, later = inputs["input_ids"].shape[1], torch.tensor([text(9, 20 + b) for b in range(3)])
    with tokencomp.patch(model, plan=PLANS["entry"]) as handle, torch.no_grad():
        positions = FAMILY.positions(model, inputs)
        out = model(**inputs, position_ids=positions, use_cache=True)
        left = oracle.kept_columns(handle, inputs, FAMILY.layers)
        cache = {oracle.cache_name(out): oracle.cache_of(out)}
        logits = []
        for a, b in ((0, 1), (1, 9)):
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(later[:, :b])], 1)
            own = positions[:, -1:] + 1 + torch.arange(a, b)
            turn = {"input_ids": later[:, a:b], "attention_mask": mask, "position_ids": own}
            if backend == FLASH and b - a > 1:
                with pytest.raises(UnsupportedModelError, match='attn_implementation="sdpa"'):
                    model(**turn, **cache, use_cache=True)
                return
            logits.append(model(**turn, **cache, use_cache=True).logits)
        media = FAMILY.batch([[text(2), FAMILY.image(), text(3)]] * 3)
        media["attention_mask"] = torch.ones(3, width + 9 + media["input_ids"].shape[1]).long()
        with pytest.raises(UnsupportedCacheError, match="a window of 5 tokens"):
            model(**media, **cache)
    model.set_attn_implementation("sdpa")
    expected = expected_logits(model, inputs, left, later)[:, width:]
    assert (torch.cat(logits, 1) - expected).abs().max() < 5e-5
