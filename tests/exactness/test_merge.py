"""`merge=True` equals a dense float64 run that merges in loops and adds log(size) to logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import matrix, oracle, plans
from support.families import FAMILIES, Family, text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.engine.weights import extra_dims

KEEPERS = [c for c in matrix.cases() if not make_reducer(c[0], **c[1]).merges]
FAMILY_NAMES = sorted(set(FAMILIES) - {"qwen3_vl_moe"})  # torch has no float64 for its experts
two_families = pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
KCENTER = make_reducer("kcenter")


def rows(family: Family) -> list[list[Any]]:
    """Ragged: image, video + image, text only."""
    torch.manual_seed(7)
    return [
        [text(3), family.image(0), text(9, 3)],
        [family.video(4), text(3, 4), family.image(2), text(5, 5)],
        [text(11, 6)],
    ]


def patched(
    model: nn.Module, ratio: float = 0.8, reducer: str = "kcenter", **options: Any
) -> tokencomp.Handle:
    return tokencomp.patch(model, ratio, reducer=reducer, merge=True, **options)


def check_dense(
    model: nn.Module,
    family: Family,
    handle: tokencomp.Handle,
    steps: int = 8,
    kinds: frozenset[str] | None = None,
) -> None:
    """Prefill and decode steps of a ragged batch."""
    inputs = family.batch(rows(family))
    with handle:
        out = oracle.generate(model, inputs, steps)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    merged = oracle.Merged(handle, kinds)
    length = inputs["input_ids"].shape[1]
    new = out.sequences[:, length:][:, :-1]
    dense = oracle.masked_logits(model, family, inputs, masks, new, merged)
    plain = oracle.masked_logits(model, family, inputs, masks, new)
    assert merged.sizes.max() > 2
    for step, logits in enumerate(out.logits):
        at = length - 1 + step
        assert (logits - dense[:, at]).abs().max() < 1e-5, f"step {step}"
        assert (logits[:2] - plain[:2, at]).abs().max() > 1e-3  # merging matters
        assert (logits[2] - plain[2, at]).abs().max() < 1e-5  # but not to text


@pytest.mark.thin(2)
def test_every_family(family: Family, backend: str) -> None:
    model = family.build(backend)
    check_dense(model, family, patched(model))


@pytest.mark.thin(2)
@two_families
@pytest.mark.parametrize("case", KEEPERS, ids=matrix.case_id)
def test_every_reducer_that_keeps_tokens(case: matrix.Case, name: str) -> None:
    """At entry and between layers."""
    family = FAMILIES[name]
    model = family.build()
    reducer, options = matrix.on_model(case, model)
    check_dense(model, family, patched(model, 0.6, reducer, **options), 3)


def test_auto_merges_in_images(family: Family) -> None:
    """Of a batch with videos too, which lose theirs."""
    model = family.build()
    handle = tokencomp.patch(model, 0.8, reducer="kcenter", merge="auto")
    assert "kcenter, merging the rest of images, at entry" in repr(handle)
    check_dense(model, family, handle, 4, frozenset({"image"}))


def test_auto_drops_where_little_stays() -> None:
    """As if it were told to, and so do videos."""
    family = FAMILIES["qwen2_vl"]
    model, steps = family.build(), {}
    video = family.batch([[family.video(4), text(3, 4)]])
    image = family.batch([[family.image(0), text(3, 4)]])
    for merge in ("auto", False):
        with tokencomp.patch(model, 0.92, reducer="kcenter", merge=merge) as handle:
            steps[merge] = [model(**image).logits]
            assert handle.stats.merged_from is None
            handle.set(ratio=0.8)
            steps[merge].append(model(**video).logits)
            assert handle.stats.merged_from is None
    assert all(map(torch.equal, steps["auto"], steps[False]))
    with tokencomp.patch(model, 0.9, reducer="kcenter", merge="auto") as handle:
        model(**image)
        assert handle.stats.merged_from == 0  # up to a ratio of 0.9, which it includes
    with tokencomp.patch(model, budget=8, reducer="kcenter", merge="auto") as handle:
        model(**image)
        assert handle.stats.merged_from == 0
        handle.set(budget=1)
        model(**image)
        assert handle.stats.merged_from is None


def test_auto_drops_where_positions_are_compact() -> None:
    model = FAMILIES["internvl"].build()
    handle = tokencomp.patch(model, 0.5, reducer="kcenter", merge="auto", positions="compact")
    assert not handle.plan.may_merge


@two_families
def test_two_stages(name: str) -> None:
    """Merging again between layers starts from the sizes that merging at entry left."""
    family = FAMILIES[name]
    model = family.build()
    plan = Plan((Stage(0, 0.5, KCENTER, merge=True), Stage(2, 0.25, KCENTER, merge=True)))
    check_dense(model, family, tokencomp.patch(model, plan=plan))


@two_families
def test_rest_of_one_stage(name: str) -> None:
    """Each stage has its own; merged rows that a later one drops are gone with their weight."""
    family = FAMILIES[name]
    model = family.build()
    plan = Plan((Stage(0, 0.5, KCENTER, merge=True), Stage(2, 0.25, make_reducer("uniform"))))
    check_dense(model, family, tokencomp.patch(model, plan=plan))
    plan = Plan((Stage(0, 0.5, KCENTER), Stage(2, 0.1, make_reducer("uniform"), merge=True)))
    check_dense(model, family, tokencomp.patch(model, plan=plan))


def test_behind_the_tower() -> None:
    """What the tower drops is gone; of what reaches the decoder, the rest is merged."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    inputs = family.batch(rows(family)[:1])
    with patched(model, 0.75, tower_ratio=0.5) as handle:
        model(**inputs, use_cache=False)
    sizes = handle.stats.tower_kept(0)
    with patched(model, 0.75, tower_ratio=0.5):
        layers = oracle.cache_of(model(**inputs, use_cache=True)).layers
    (span,) = handle.stats.spans[0]
    others = handle.stats.lengths[0] - span.length
    assert layers[0].rows - others == len(sizes[0]) < span.length


@two_families
def test_batch_equals_singles_and_beams(name: str) -> None:
    family = FAMILIES[name]
    model, data = family.build(), rows(family)
    options = dict(num_beams=3, num_return_sequences=2)
    with patched(model):
        batch = oracle.generate(model, family.batch(data))
        beams = oracle.generate(model, family.batch(data), **options)
        for b, row in enumerate(data):
            alone = oracle.generate(model, family.batch([row]))
            for step in range(8):
                assert (batch.logits[step][b] - alone.logits[step][0]).abs().max() < 1e-4
            found = oracle.generate(model, family.batch([row]), **options).sequences[:, -8:]
            assert torch.equal(beams.sequences[2 * b : 2 * b + 2, -8:], found)


@two_families
def test_prompt_lookup_and_no_cache(name: str) -> None:
    """Rejected drafts crop the cache; without a cache every step is a prefill."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(4, 3) * 3]])
    with patched(model):
        options = dict(max_new_tokens=12, repetition_penalty=1.5)
        greedy = model.generate(**inputs, **options)
        bare = model.generate(**inputs, **options, use_cache=False)
        lookup = dict(prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
        assisted = model.generate(**inputs, **options, **lookup)
    n = min(greedy.shape[1], assisted.shape[1])
    assert torch.equal(greedy, bare)
    assert torch.equal(greedy[:, :n], assisted[:, :n])


@two_families
def test_second_image_on_the_cache(name: str) -> None:
    family = FAMILIES[name]
    model, image, other = family.build(), family.image(0), family.image(1)
    first, second = [text(3), image, text(5, 3)], [text(2, 9), other, text(4, 8)]
    whole = family.batch([[*first, *second]])
    positions = family.positions(model, whole)
    n = family.batch([first])["input_ids"].shape[1]
    with patched(model), torch.no_grad():
        out = model(**family.batch([first]), position_ids=positions[..., :n], use_cache=True)
        turn = {**family.batch([second]), "attention_mask": whole["attention_mask"]}
        cache = oracle.cache_of(out)
        got = model(**turn, position_ids=positions[..., n:], past_key_values=cache).logits[:, -1]
        expected = model(**whole, position_ids=positions).logits[:, -1]
    assert (got - expected).abs().max() < 1e-5


@two_families
def test_a_cache_keeps_its_weights_at_ratio_0(name: str) -> None:
    """A second turn at ratio 0 reads the weights of the first."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.batch([rows(family)[0]])
    last = family.positions(model, inputs)[..., -1:]

    def check(later: Any) -> None:
        for step in range(3):
            ids = expected.sequences[:, step - 8, None]
            positions = last + step + 1
            out = model(ids, position_ids=positions, past_key_values=later, use_cache=True)
            assert (out.logits[:, -1] - expected.logits[step + 1]).abs().max() < 1e-5

    with patched(model) as handle:
        expected = oracle.generate(model, inputs)
        later = oracle.cache_of(model(**inputs, use_cache=True))
        handle.set(ratio=0.0, merge=False)
        check(later)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_what_merges_by_itself_has_no_weights(cache: str) -> None:
    """Also while the weights of another plan of the patch can reach attention."""
    family = FAMILIES["llava_onevision"]
    model, inputs = family.build(), family.batch(rows(family))
    how = {} if cache == "dynamic" else {"cache_implementation": cache}
    with tokencomp.patch(model, 0.8, reducer="bipartite"):
        expected = oracle.generate(model, inputs, **how)
    with patched(model) as handle:
        handle.set(reducer="bipartite", merge=False)
        got = oracle.generate(model, inputs, **how)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(got.logits, expected.logits, strict=True))


@two_families
def test_static_cache(name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.build(), family.batch(rows(family))
    with patched(model):
        static = oracle.generate(model, inputs, cache_implementation="static")
        dynamic = oracle.generate(model, inputs)
    assert all(
        (a - b).abs().max() < 1e-5 for a, b in zip(static.logits, dynamic.logits, strict=True)
    )


@two_families
def test_the_cache_holds_a_row_for_every_token(name: str) -> None:
    """As many as without a patch; of what a later stage drops, none."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.batch(rows(family)[:1])
    uniform = make_reducer("uniform")
    plan = Plan((Stage(0, 0.5, KCENTER, merge=True), Stage(2, 0.25, uniform)))
    for setting in ({"ratio": 0.8, "reducer": "kcenter", "merge": True}, {"plan": plan}):
        with tokencomp.patch(model, **setting) as handle:
            out = model(**inputs, use_cache=True)
        layers = oracle.cache_of(out).layers
        held = [sum(t.nbytes for t in (layer.keys, layer.values)) for layer in layers]
        assert sum(held) == handle.stats.kv_bytes_after
        whole = handle.stats.kv_bytes_before // len(layers)
        assert held[0] == whole and (held[-1] < whole) == ("plan" in setting)


@two_families
def test_decode_steps_read_plain_heads(name: str) -> None:
    """Attention has further dimensions in a prefill alone, and then the patch runs nothing more."""
    family, dims = FAMILIES[name], []
    sdpa = AttentionInterface()["sdpa"]

    def recorder(module: Any, query: Tensor, *args: Any, **kwargs: Any):
        dims.append((query.shape[-2] > 1, query.shape[-1]))
        return sdpa(module, query, *args, **kwargs)

    AttentionInterface.register("recorder", recorder)
    AttentionMaskInterface.register("recorder", sdpa_mask)
    model, inputs = family.build(), family.batch(rows(family)[:1])
    model.set_attn_implementation("recorder")
    with patched(model):
        oracle.generate(model, inputs, 3)
    text = [dim for is_prompt, dim in dims[-3 * family.layers :] if is_prompt]
    steps = [dim for is_prompt, dim in dims[-3 * family.layers :] if not is_prompt]
    head = family.decoder(model).layers[0].self_attn.head_dim
    assert set(text) == {extra_dims(head) + head} and set(steps) == {head}


@two_families
def test_leaves_no_trace(name: str, backend: str) -> None:
    """Ratio 0 is bit-identical, the model's config never changes, unpatch restores every module."""
    family = FAMILIES[name]
    model, inputs = family.build(backend), family.batch(rows(family))
    expected, before = model(**inputs).logits, [dict(m.__dict__) for m in model.modules()]
    config = copy.deepcopy(model.config.to_dict())
    handle = patched(model, 0.0)
    assert torch.equal(model(**inputs).logits, expected)
    handle.set(ratio=0.5)
    assert model.config.to_dict() == config
    assert family.decoder(model).config._attn_implementation == backend
    assert not torch.equal(model(**inputs).logits, expected)
    with handle.disabled():
        assert torch.equal(model(**inputs).logits, expected)
    handle.set(ratio=0.0)
    assert torch.equal(model(**inputs).logits, expected)
    tokencomp.unpatch(model)
    after = [m.__dict__ for m in model.modules()]
    assert all(a.get("config") is b.get("config") for a, b in zip(after, before, strict=True))
    assert torch.equal(model(**inputs).logits, expected)


@two_families
def test_the_backend_sees_what_flash_attention_takes(name: str) -> None:
    """The user's own backend runs, with its own name in the config, on equal head dimensions."""
    family, seen = FAMILIES[name], []
    sdpa = AttentionInterface()["sdpa"]

    def recorder(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        assert module.config._attn_implementation == "recorder"
        seen.append({query.shape[-1], key.shape[-1], value.shape[-1]})
        return sdpa(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("recorder", recorder)
    AttentionMaskInterface.register("recorder", sdpa_mask)
    model, inputs = family.build(), family.batch(rows(family)[:1])
    with patched(model):
        expected = model(**inputs).logits
        model.set_attn_implementation("recorder")  # a change while patched counts
        assert torch.equal(model(**inputs).logits, expected)
    layers = family.layers
    assert all(len(d) == 1 and min(d) % 8 == 0 for d in seen[-layers:])


@pytest.mark.parametrize("name", ["qwen2_vl"])
def test_runs_in_the_flash_kernel(name: str) -> None:
    """PyTorch's flash kernel, which falls back to nothing here, gives the same."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.batch(rows(family)[:1])
    with patched(model), torch.no_grad():
        expected = oracle.generate(model, inputs).logits
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            got = oracle.generate(model, inputs).logits
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, expected, strict=True))


def test_a_prompt_that_fails_leaves_attention_as_it_was() -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch(rows(family)[:1])
    before = [getattr(m, "config", None) for m in model.modules()]
    last = family.decoder(model).layers[-1]
    with patched(model):
        failing = last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        failing.remove()
        after = [getattr(m, "config", None) for m in model.modules()]
        assert all(a is b for a, b in zip(after, before, strict=True))
        model(**inputs)


def test_what_says_so() -> None:
    """Handle, stats, FLOPs (a few more dimensions per head), the JSON form of the plan."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.batch(rows(family)[:1])
    with tokencomp.patch(model, 0.8, reducer="kcenter") as handle:
        model(**inputs)
    plain = handle.stats
    with patched(model) as handle:
        model(**inputs)
        assert "kcenter, merging the rest, at entry" in repr(handle)
        (stage,) = tokencomp.plan_to_json(handle.plan)
        stats = handle.stats
        handle.set(plan=Plan((Stage(0, 0.5, plans.Ragged(), merge=True),)))  # without a name
        assert "(Ragged, merging the rest, at entry)" in repr(handle)
    assert stage["merge"] is True
    assert "the rest merged" in str(stats) and "merged" not in str(plain)
    assert stats.summary()["merged_from"] == 0 and "merged_from" not in plain.summary()
    shape, left = stats.shape, stats.lengths[0] - stats.tokens_before[0] + stats.tokens_after[0][0]
    more = 4 * shape.heads * 8 * (left * (left + 1) // 2) * shape.num_layers
    assert stats.flops_after == plain.flops_after + more
    assert stats.tokens_after == plain.tokens_after and stats.kept() == plain.kept()
