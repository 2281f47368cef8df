"""A merged token is one row of a cache, and later calls count it as the tokens it represents.

The oracle is one float64 run over all turns, of full length, which merges in loops, hides dropped
columns and adds log(size) to the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import backends, oracle
from support.backends import FLASH, FLEX
from support.caches import static_cache
from support.families import FAMILIES, Family, Media, text
from support.prompts import ragged
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.engine import later
from tokencomp.engine.weights import Carrier, carrier
from tokencomp.errors import UnsupportedCacheError

KCENTER, UNIFORM = make_reducer("kcenter"), make_reducer("uniform")
DROPS = Plan((Stage(0, 0.4, UNIFORM),))
MERGES = Plan((Stage(0, 0.3, KCENTER, merge=True),))
AUTO = Plan((Stage(0, 0.3, KCENTER, merge="auto"),))
TWICE = Plan((Stage(0, 0.5, KCENTER, merge=True), Stage(2, 0.3, KCENTER, merge=True)))
LATER = Plan((Stage(0, 0.5, UNIFORM), Stage(2, 0.2, KCENTER, merge=True)))


class Talk:
    """Turns of one conversation on a cache of a patched model; text alone, and media.

    Parameters
    ----------
    turns
        Rows of items, and the plan under which each runs.
    """

    def __init__(
        self, family: Family, model: nn.Module, turns: list[tuple[list[Any], Plan]], cache: Any
    ) -> None:
        self.family, self.model, self.turns, self.cache = family, model, turns, cache
        self.whole = family.batch([[item for row, _ in turns for item in row]])
        self.positions = family.positions(model, self.whole)
        self.at, self.found, self.merged = 0, list[Tensor](), oracle.MergedTurns()
        self.masks = [torch.ones(1, 0, dtype=torch.bool) for _ in range(family.layers)]

    def run(self, again: bool = False) -> None:
        """All turns; `again`: cut the last token of every turn of text off and say it again."""
        handle = tokencomp.patch(self.model, 0.5)
        for row, plan in self.turns:
            inputs = self.family.batch([row])
            width = inputs["input_ids"].shape[1]
            handle.set(plan=plan)
            self.found.append(self._call(inputs, self.at, self.at + width))
            media = any(isinstance(item, Media) for item in row)
            if again and not media:
                self._crop_last(inputs, width)
            masks = [torch.ones(1, width, dtype=torch.bool)] * self.family.layers
            if media:
                masks = oracle.kept_columns(handle, inputs, self.family.layers)
                if any(stage.merge for stage in plan.stages):
                    self.merged.add(handle, self.at)
            self.masks = [torch.cat(pair, 1) for pair in zip(self.masks, masks, strict=True)]
            self.at += width

    def _call(self, inputs: dict[str, Tensor], start: int, stop: int) -> Tensor:
        call = {**inputs, "attention_mask": self.whole["attention_mask"][:, :stop]}
        call["position_ids"] = self.positions[..., start:stop]
        return self.model(**call, past_key_values=self.cache, use_cache=True).logits

    def _crop_last(self, inputs: dict[str, Tensor], width: int) -> None:
        last = {"input_ids": inputs["input_ids"][:, -1:]}
        before, self.cache = self.found[-1][:, -1:], copy.deepcopy(self.cache)
        self.cache.crop(-1)
        found = self._call(last, self.at + width - 1, self.at + width)
        assert oracle.difference(found, before) < 1e-5

    def away(self) -> tuple[float, float]:
        """How far logits of columns that stay are from the oracle; from the run that drops."""
        tokencomp.unpatch(self.model)
        left, found = self.masks[-1][0], torch.cat(self.found, 1)
        runs = [
            oracle.masked_logits(self.model, self.family, self.whole, self.masks, merged=merged)
            for merged in (self.merged, None)
        ]
        exact, dropped = (oracle.difference(found[:, left], run[:, left]) for run in runs)
        return exact, dropped


def conversation(family: Family, first: Plan) -> list[tuple[list[Any], Plan]]:
    """Media that merge, drop, or do both by kind, with text of one and of several words between."""
    torch.manual_seed(11)
    image, other, video = family.image(0), family.image(1), family.video(4)
    return [
        ([text(3), image, text(5, 3)], first),
        ([text(4, 9)], first),
        ([text(1, 5)], first),
        ([text(2, 8), other, text(3, 2)], DROPS),
        ([text(1, 6)], DROPS),
        ([text(2, 4), video, text(2, 6), other, text(3, 1)], AUTO),
        ([text(3, 7)], AUTO),
        ([text(1, 2)], AUTO),
        ([text(1, 3)], AUTO),
    ]


WAYS = {
    "sdpa": "sdpa", "eager": "eager", "flash": FLASH, "flex": FLEX, "wider heads": "sdpa",
}  # fmt: skip


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The attention backend; SDPA with a mask of numbers, and as on a GPU with wider heads."""
    backends.install(monkeypatch, WAYS[request.param])
    if request.param == "wider heads":
        monkeypatch.setattr(later, "carrier", lambda *_: Carrier(None, "as on a GPU"))
    yield request.param


ROWS = {"qwen2_vl": 54, "llava_onevision": 103}  # that stay of a conversation


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ROWS)
def test_a_conversation(name: str, kind: str, way: str) -> None:
    """A static cache needs room for the rows that stay alone."""
    family = FAMILIES[name]
    model = backends.build(family, WAYS[way])
    cache = static_cache(model, ROWS[name]) if kind == "static" else DynamicCache()
    talk = Talk(family, model, conversation(family, MERGES), cache)
    try:
        with torch.no_grad():
            talk.run(again=hasattr(cache.layers[0] if cache.layers else DynamicLayer, "crop"))
    except UnsupportedCacheError:
        assert kind == "static" and way in ("flash", "flex")
        pytest.skip("the backend takes no static cache in this release")
    exact, dropped = talk.away()
    assert exact < 2e-5 and dropped > 1e-3
    assert int(talk.masks[0].sum()) == ROWS[name] < talk.at / 1.5


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", ["twice", "later"])
def test_stages_between_layers(plan: str, way: str) -> None:
    """Layers hold other rows, with other weights, or none."""
    family = FAMILIES["qwen2_vl"]
    model = backends.build(family, WAYS[way])
    first = {"twice": TWICE, "later": LATER}[plan]
    talk = Talk(family, model, conversation(family, first), DynamicCache())
    with torch.no_grad():
        talk.run(again=True)
    exact, dropped = talk.away()
    assert exact < 2e-5 and dropped > 1e-3


CALLS: dict[str, dict[str, Any]] = {
    "chunks": {"prefill_chunk_size": 7},
    "static": {"cache_implementation": "static"},
    "chunks on static": {"prefill_chunk_size": 7, "cache_implementation": "static"},
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_a_ragged_batch(name: str, call: str, way: str) -> None:
    family = FAMILIES[name]
    model, inputs = backends.build(family, WAYS[way]), ragged(family)
    if "chunks" in call and not hasattr(model, "_expand_multimodal_outputs"):
        pytest.skip("this transformers cannot chunk prompts with media, patched or not")
    try:
        handle, out, masks = oracle.generated(model, family, inputs, 6, CALLS[call], plan=MERGES)
    except UnsupportedCacheError:
        assert "static" in call and way in ("flash", "flex")
        pytest.skip("the backend takes no static cache in this release")
    merged = oracle.Merged(handle)
    assert oracle.deviation(model, family, inputs, out, masks, merged) < 1e-5


def test_gradients_flow_through_a_cache(way: str) -> None:
    """Of a later turn, to all parameters, by rows that were merged in the first one."""
    family = FAMILIES["llava_onevision"]
    model = backends.build(family, WAYS[way])
    turns = conversation(family, MERGES)[:2]
    talk = Talk(family, model, turns, DynamicCache())
    talk.run()
    talk.found[1].square().sum().backward()
    tokencomp.unpatch(model)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    whole = {k: v.double() if v.is_floating_point() else v for k, v in talk.whole.items()}
    talk.merged.sizes = torch.ones(whole["input_ids"].shape, dtype=torch.float64)
    with oracle.masked(exact, family, talk.masks, talk.merged):
        logits = exact(**whole, position_ids=talk.positions, use_cache=False).logits
    logits[:, -talk.found[1].shape[1] :].square().sum().backward()
    assert len(found) > 20
    for name, parameter in exact.named_parameters():
        if name in found:
            scale = float(parameter.grad.abs().max())
            assert float((found[name] - parameter.grad).abs().max()) < 1e-6 + 1e-4 * scale


class Entering:
    """Rows that reach the decoder, in the full-length run: what a reducer has made of tokens."""

    def __init__(self, rows: Tensor, kept: Tensor) -> None:
        self.rows, self.kept, self.sizes = rows, kept, torch.ones(0)

    def __call__(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if layer == 0:
            x = x.clone()
            for b, kept in enumerate(self.kept):
                columns = kept.nonzero()[:, 0]
                x[b, columns] = self.rows[b, -len(columns) :].to(x)
        return x, self.sizes.log()


@pytest.mark.parametrize("reducer", ["bipartite", "aim", "visionzip"])
def test_reducers_that_merge_by_themselves_have_no_weights(reducer: str, way: str) -> None:
    """Their rows count once, in the prompt and in every later step."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = backends.build(family, WAYS[way]), ragged(family)
    entered = list[Tensor]()

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append(kwargs["inputs_embeds"])

    with tokencomp.patch(model, 0.6, reducer=reducer) as handle:
        hook = family.decoder(model).register_forward_pre_hook(note, with_kwargs=True)
        out = oracle.generate(model, inputs, 6)
        hook.remove()
        masks = oracle.kept_columns(handle, inputs, family.layers)
    rows = Entering(entered[0], masks[0])
    assert oracle.deviation(model, family, inputs, out, masks, rows) < 2e-5
    assert oracle.deviation(model, family, inputs, out, masks) > 1e-3


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_carries_weights(dtype: torch.dtype, masked: bool) -> None:
    """A mask where attention takes numbers and has a mask anyway, or none is slower for it."""

    def numbers(backend: str, device: str, copies: bool = False) -> torch.dtype | None:
        return carrier(backend, device, dtype, masked, copies).numbers

    assert numbers("eager", "cuda") == numbers("eager", "cpu") == dtype
    assert numbers("sdpa", "cpu") == torch.float32
    assert numbers("sdpa", "cuda") == (dtype if masked else None)
    assert numbers("sdpa", "cpu", copies=True) == (torch.float32 if masked else None)
    # Torch's FlexAttention on a CPU writes outside of its memory where it adds such a mask.
    for backend in (FLASH, "kernels-community/flash-attn3", FLEX):
        assert numbers(backend, "cuda") is numbers(backend, "cpu") is None
