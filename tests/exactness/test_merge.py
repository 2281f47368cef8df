"""`merge=True` equals a dense float64 run that merges in loops and adds log(size) to logits."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import transformers
from support import matrix, oracle
from support.families import FAMILIES, Family, text
from support.family.llava import LlavaOn
from support.family.qwen import Qwen3VL
from support.prompts import ragged, single
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokencomp
from benchmarks.conformance.run import model_classes
from benchmarks.conformance.variants import variants
from tokencomp import Plan, Stage, make_reducer
from tokencomp.conformance.build import tiny_model
from tokencomp.engine import weights
from tokencomp.errors import MergeWarning, OptionError, UnsupportedModelError
from tokencomp.tokens import stacks

CASES = [(case, make_reducer(case[0], **case[1]).traits.merges) for case in matrix.cases()]
KEEPERS = [case for case, merges in CASES if not merges]
MERGERS = [case for case, merges in CASES if merges]
FAMILY_NAMES = sorted(set(FAMILIES) - {"qwen3_vl_moe"})  # torch has no float64 for its experts
two_families = pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
KCENTER, UNIFORM = make_reducer("kcenter"), make_reducer("uniform")
SMALL = {"num_hidden_layers": 2}
MERGE = {"ratio": 0.8, "reducer": "kcenter", "merge": True}


def check(
    family: Family,
    steps: int = 8,
    model: nn.Module | None = None,
    inputs: dict[str, Tensor] | None = None,
    **setting: Any,
) -> None:
    """Prefill and decode steps of a ragged batch: two samples with media, and one of text."""
    model, inputs = model or family.build(), inputs or ragged(family)
    handle, out, masks = oracle.generated(model, family, inputs, steps, **setting)
    merged = oracle.Merged(handle)
    assert oracle.deviation(model, family, inputs, out, masks, merged) < 1e-5
    assert merged.sizes.max() > 2
    width, found = inputs["input_ids"].shape[1], torch.stack(out.logits, 1)
    plain = oracle.masked_logits(model, family, inputs, masks, out.sequences[:, width:-1])
    away = (found - plain[:, width - 1 :]).abs().amax((1, 2))
    assert away[:2].min() > 1e-3 and away[2] < 1e-5  # merging matters, but not to text


@pytest.mark.thin(2)
def test_every_family(family: Family, backend: str) -> None:
    check(family, model=family.build(backend), **MERGE)


@pytest.mark.thin(2)
@two_families
@pytest.mark.parametrize("case", KEEPERS, ids=matrix.case_id)
def test_every_reducer_that_keeps_tokens(case: matrix.Case, name: str) -> None:
    """At entry and between layers."""
    family = FAMILIES[name]
    model = family.build()
    reducer, options = matrix.on_model(case, model)
    check(family, 3, model, ratio=0.6, reducer=reducer, merge=True, **options)


class TwoLevels(Qwen3VL):
    """Features of two blocks of the tower are added, behind the first two decoder layers."""

    deepstack = (0, 1)


PLANS = {
    # Merging again between layers starts from the sizes that merging at entry left.
    "twice": Plan((Stage(0, 0.5, KCENTER, merge=True), Stage(2, 0.25, KCENTER, merge=True))),
    # Merged rows that a later stage drops are gone with their weight.
    "entry": Plan((Stage(0, 0.5, KCENTER, merge=True), Stage(2, 0.25, UNIFORM))),
    "later": Plan((Stage(0, 0.5, KCENTER), Stage(2, 0.1, UNIFORM, merge=True))),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "of", [FAMILIES["qwen2_vl"], FAMILIES["llava_onevision"], TwoLevels()], ids=lambda f: f.name
)
def test_stages_that_merge_or_drop(of: Family, plan: str) -> None:
    check(of, plan=PLANS[plan])


@two_families
def test_two_stages_beside_a_longer_text(name: str) -> None:
    """Layers before and after the second stage hold as many rows as the text is long."""
    family = FAMILIES[name]
    rows = [[text(3), family.image(0), text(4, 2)], [family.image(1), text(3, 4)], [text(70, 5)]]
    check(family, 3, inputs=family.batch(rows), plan=PLANS["twice"])


@two_families
def test_auto_merges_in_images_and_videos(name: str) -> None:
    """Of one batch."""
    check(FAMILIES[name], 4, ratio=0.8, reducer="kcenter", merge="auto")


def test_auto_drops_where_little_of_an_image_stays() -> None:
    """Images merge up to a ratio of 0.9, which is included, videos at every ratio."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    video = family.batch([[family.video(4), text(3, 4)]])
    image = family.batch([[family.image(0), text(3, 4)]])
    cases: list[tuple[Any, dict[str, Any], bool]] = [
        (image, {"ratio": 0.92}, False), (video, {"ratio": 0.92}, True),
        (image, {"budget": 1}, False), (image, {"budget": 512}, False),
        (image, {"ratio": {"image": 0.95}}, False), (image, {"ratio": 0.9}, True),
        (image, {"budget": 8}, True),
    ]  # fmt: skip
    for inputs, setting, merges in cases:
        logits = []
        for merge in ("auto", False):
            with tokencomp.patch(model, **setting, reducer="kcenter", merge=merge) as handle:
                logits.append(model(**inputs).logits)
                assert (handle.stats.merged_from == 0) == (merges and merge == "auto"), setting
        assert torch.equal(*logits) != merges
    both, logits = family.batch([[family.image(0), text(3, 4)], [family.video(4), text(3, 4)]]), []
    for merge in ("auto", False):
        with torch.no_grad(), tokencomp.patch(model, 0.92, reducer="kcenter", merge=merge):
            logits.append(model(**both).logits[:, -3:])
    assert [torch.equal(*of_sample) for of_sample in zip(*logits, strict=True)] == [True, False]


def test_after_the_tower() -> None:
    """What the tower drops is gone; all that reaches the decoder is merged, and counted."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), single(family)
    with tokencomp.patch(model, **{**MERGE, "ratio": 0.75}, tower_ratio=0.5) as handle:
        layers = oracle.cache_of(model(**inputs, use_cache=True)).layers
    (span,), (left,) = handle.stats.spans[0], handle.stats.tower_kept(0)
    others = handle.stats.lengths[0] - span.length
    (kept,) = handle.stats.kept()[-1]
    assert layers[0].keys.shape[2] - others == len(kept) == span.length // 4
    assert layers[0].row_map.weights.sum() - others == len(left) == span.length // 2


@two_families
def test_the_cache_holds_one_row_for_every_token_that_is_kept(name: str) -> None:
    """Whatever is merged into it; `stats` counts the bytes, and says nothing without a cache."""
    family = FAMILIES[name]
    model, inputs = family.build(), single(family)
    for setting in (MERGE, {"plan": PLANS["entry"]}):
        with tokencomp.patch(model, **setting) as handle:
            layers = oracle.cache_of(model(**inputs, use_cache=True)).layers
            masks = oracle.kept_columns(handle, inputs, family.layers)
            held = [sum(t.nbytes for t in (layer.keys, layer.values)) for layer in layers]
            whole = handle.stats.kv_bytes_before / len(layers)
            share = [int(m.sum()) / m.shape[1] for m in masks]
            assert held == [pytest.approx(whole * part) for part in share] and share[0] < 0.8
            assert sum(held) == handle.stats.kv_bytes_after
            assert f"cache {100 * sum(share) / len(share):.0f} %" in str(handle.stats)
            model(**inputs, use_cache=False)
            assert "cache" not in str(handle.stats)


def test_long_spans_are_merged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many patches that all their cosines would not fit into memory."""
    monkeypatch.setattr(stacks, "BLOCK", 16)
    check(FAMILIES["vila"], 2, **MERGE)


def test_the_weights_of_another_plan_do_not_stay() -> None:
    """Reducers that merge by themselves have none."""
    family = FAMILIES["llava_onevision"]
    model, inputs = family.build(), ragged(family)
    with tokencomp.patch(model, 0.8, reducer="bipartite"):
        expected = oracle.generate(model, inputs)
    with tokencomp.patch(model, **MERGE) as handle:
        oracle.generate(model, inputs)
        handle.set(reducer="bipartite", merge=False)
        assert oracle.close(oracle.generate(model, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 80])
def test_weights_have_more_digits_than_the_dtype(dim: int, dtype: torch.dtype) -> None:
    """scaling · q·k gains log(size), to far more digits than one number of the dtype has."""
    q = torch.randn(2, 4, 3, dim).to(dtype)
    k, v = (torch.randn(2, 2, 9, dim).to(dtype) for _ in range(2))
    sizes, scaling = torch.randint(1, 400, (2, 7)).float(), dim**-0.5
    wide_q, wide_k, wide_v = weights.widen(q, k, v, weights.bias_dims(q, k, sizes, scaling))
    assert torch.equal(wide_v[..., :dim], v) and not wide_v[..., dim:].any()
    repeated = wide_k.repeat_interleave(2, 1).double()
    added = scaling * (wide_q[..., dim:].double() @ repeated[..., dim:].mT)
    wanted = torch.nn.functional.pad(sizes.double().log(), (0, 2))[:, None, None]
    assert (added - wanted).abs().max() < 2e-4


def test_stats_count_the_weights() -> None:
    """FLOPs of a few more dimensions per head; stats and the plan's JSON say that it merges."""
    family, found = FAMILIES["qwen2_vl"], []
    model, inputs = family.build(), single(family)
    for merge in (False, True):
        with tokencomp.patch(model, **{**MERGE, "merge": merge}) as handle:
            model(**inputs)
        found.append(handle.stats)
        assert (handle.stats.summary().get("merged_from") == 0) == merge
        assert bool(tokencomp.plan_to_json(handle.plan)[0].get("merge")) == merge
    plain, stats = found
    (shape, *_), left = (
        stats.layers,
        stats.lengths[0] - stats.tokens_before[0] + stats.tokens_after[0][0],
    )
    more = 4 * shape.heads * 8 * (left * (left + 1) // 2) * len(stats.layers)
    assert stats.flops_after == plain.flops_after + more
    assert stats.tokens_after == plain.tokens_after and stats.kept() == plain.kept()


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MERGERS, ids=matrix.case_id)
def test_reducers_that_merge_by_themselves_are_refused(case: matrix.Case) -> None:
    model = FAMILIES["qwen2_vl"].build()
    with pytest.raises(OptionError, match=r"merge=True: .* merges tokens by itself"):
        tokencomp.patch(model, 0.5, reducer=case[0], merge=True, **case[1])


@pytest.mark.parametrize("model_type", ["mistral_large4", "hy_v4_vl"])
def test_attention_with_an_indexer_is_refused(model_type: str) -> None:
    """It masks what its indexer has not chosen under the names of known backends alone."""
    model_class = getattr(transformers, model_classes().get(model_type, ""), None)
    if model_class is None:
        pytest.skip("the release has no such type")
    model = tiny_model(model_class, CONFIG_MAPPING[model_type](), variants(model_type)[0]).model
    with pytest.raises(UnsupportedModelError, match="do not reach the attention of"):
        tokencomp.patch(model, 0.5, reducer="kcenter", merge=True)


def test_capped_logits_are_refused() -> None:
    """The cap would apply to the weights too. The default drops, and says so."""
    weights._warn_once.cache_clear()
    types = {"layer_types": ["full_attention"] * 2}
    capped = LlavaOn(transformers.Gemma2Config, **SMALL, **types, attn_logit_softcapping=30.0)
    model, inputs = capped.build("eager"), single(capped)
    with pytest.raises(UnsupportedModelError, match="caps its attention logits"):
        tokencomp.patch(model, **MERGE)
    with pytest.warns(MergeWarning, match="caps its attention logits"):
        handle = tokencomp.patch(model, 0.5)
    model(**inputs)
    assert handle.stats.merged_from is None


@pytest.mark.parametrize(("dim", "merges"), [(248, True), (256, False)])
def test_the_widest_heads_that_merge_by_default(dim: int, merges: bool) -> None:
    """FlashAttention takes 256 dimensions, and the weights need eight of them."""
    weights._warn_once.cache_clear()
    wide = LlavaOn(transformers.Qwen3Config, **SMALL, head_dim=dim)
    model = wide.build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MergeWarning)
        handle = tokencomp.patch(model, 0.5)
    model(**single(wide))
    assert (handle.stats.merged_from == 0) == merges
    assert bool(caught) != merges


def test_attention_that_takes_no_weights() -> None:
    """As of remote code: merging is refused, and the default drops and says so, once."""
    weights._warn_once.cache_clear()
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build("sdpa"), single(family)
    attention = family.decoder(model).layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with (
        tokencomp.patch(model, **MERGE),
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
    model = FAMILIES["qwen2_vl"].build()
    with pytest.raises(OptionError, match="merge='keep'; allowed: True, False, 'auto'"):
        tokencomp.patch(model, 0.5, merge="keep")
    with pytest.raises(OptionError, match=r"merge=True.*a plan names its reducers"):
        tokencomp.patch(model, plan=Plan((Stage(0, 0.5, UNIFORM),)), merge=True)
    with pytest.raises(OptionError, match="merge=True with 'bipartite', which merges"):
        Plan((Stage(0, 0.5, make_reducer("bipartite")), Stage(2, 0.2, UNIFORM, merge=True)))
    handle = tokencomp.patch(model, **MERGE)
    with pytest.raises(OptionError, match="merge=True: 'pool' merges tokens by itself"):
        handle.set(reducer="pool", merge=True)
    assert handle.plan.entry.reducer.name == "kcenter"
    assert not handle.set(reducer="pool").plan.entry.merge  # nobody has asked for it there


def test_a_reducer_that_merges_without_saying_so() -> None:
    @dataclasses.dataclass(frozen=True)
    class Silent(tokencomp.Reducer):
        name = "silent"

        def reduce(self, tokens: tokencomp.Tokens) -> tokencomp.Kept:
            rows = torch.arange(tokens.budgets[0])
            return tokencomp.Kept(rows, tokens.features[rows] * 2)

    family = FAMILIES["qwen2_vl"]
    model = family.build()
    own = pytest.raises(OptionError, match="'silent' returns features or weights itself")
    with tokencomp.patch(model, 0.5, reducer=Silent(), merge=True), own:
        model(**single(family))
