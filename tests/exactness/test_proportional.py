"""Proportional attention equals a dense run with log(size) added to its attention logits."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from support import oracle
from support.families import FAMILIES, Family, text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.conformance.build import tiny_model
from tokencomp.conformance.prompts import Prompts
from tokencomp.conformance.run import model_classes
from tokencomp.conformance.variants import variants
from tokencomp.engine.scores.proportional import widen
from tokencomp.errors import OptionError, UnsupportedModelError

Case = tuple[str, dict[str, Any]]
MERGERS: list[Case] = [
    ("merge", {}),
    ("merge", {"weighted": False, "position": "first"}),
    ("condiv", {"power": 0.0, "merge_rest": -1.0}),
    ("pool", {}),
    ("aim", {}),
    ("merge+fastv", {}),
]
two_families = pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
mergers = pytest.mark.parametrize("case", MERGERS, ids=lambda c: "-".join([c[0], *c[1]]))


def rows(family: Family) -> list[list[Any]]:
    """Ragged: image, video + image, text only."""
    torch.manual_seed(7)
    return [
        [text(3), family.image(0), text(9, 3)],
        [family.video(4), text(3, 4), family.image(2), text(5, 5)],
        [text(11, 6)],
    ]


def patched(
    model: nn.Module, case: Case, ratio: float = 0.8, share: float = 1.0
) -> tokencomp.Handle:
    return tokencomp.patch(model, ratio, reducer=case[0], proportional_attention=share, **case[1])


@contextlib.contextmanager
def merged_at_entry(model: nn.Module, family: Family, handle: Any, bias: Tensor) -> Iterator[None]:
    """Replace kept embeddings by what the entry stage merges, and note log sizes in `bias`."""
    reducer, stats = handle.plan.entry.reducer, handle.stats
    spans, kept = stats.spans, [stats.kept(b)[0] for b in range(len(stats.spans))]

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        x = kwargs["inputs_embeds"].clone()
        for b, row in enumerate(spans):
            for span, offsets in zip(row, kept[b], strict=True):
                mask = span.special_mask()
                given = x[b, span.start : span.stop].clone()
                tokens = tokencomp.VisualTokens(given, span.grid, mask, kind=span.kind)
                got = reducer.reduce(tokens, len(offsets))
                assert got.keep.tolist() == offsets
                columns = [span.start + o for o in offsets]
                x[b, columns], bias[b, columns] = got.merged, got.sizes.log()
        return args, {**kwargs, "inputs_embeds": x}

    hook = family.decoder(model).register_forward_pre_hook(replace, with_kwargs=True)
    yield
    hook.remove()


def check_dense(model: nn.Module, family: Family, case: Case, share: float = 1.0) -> None:
    """Prefill and eight decode steps of a ragged batch."""
    inputs = family.batch(rows(family))
    with patched(model, case, share=share) as handle:
        out = oracle.generate(model, inputs)
        masks = oracle.kept_columns(handle, inputs, family.layers)
    length = inputs["input_ids"].shape[1]
    new, bias = out.sequences[:, length:][:, :-1], torch.zeros(inputs["input_ids"].shape)
    with merged_at_entry(model, family, handle, bias):
        plain = oracle.masked_logits(model, family, inputs, masks, new)
        assert bias.max() > 0.5
        dense = oracle.masked_logits(model, family, inputs, masks, new, share * bias)
    for step, logits in enumerate(out.logits):
        at = length - 1 + step
        assert (logits - dense[:, at]).abs().max() < 1e-5, f"step {step}"
        assert (logits[:2] - plain[:2, at]).abs().max() > 1e-3  # the bias matters
        assert (logits[2] - plain[2, at]).abs().max() < 1e-5  # but not to text


def test_every_family(family: Family, backend: str) -> None:
    check_dense(family.build(backend), family, MERGERS[0])


@two_families
@mergers
def test_every_reducer(case: Case, name: str, backend: str) -> None:
    check_dense(FAMILIES[name].build(backend), FAMILIES[name], case)


@two_families
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_share_of_the_logarithm(share: float, name: str, backend: str) -> None:
    family = FAMILIES[name]
    check_dense(family.build(backend), family, MERGERS[2], share)


def test_bad_shares_are_refused() -> None:
    model = FAMILIES["qwen2_vl"].build()
    for share in (-0.5, 1.5, math.nan, "half"):
        with pytest.raises(OptionError, match="a number from 0 to 1"):
            tokencomp.patch(model, 0.5, reducer="merge", proportional_attention=share)
    for share in (0, 0.0):  # as False: every token weighs the same, whatever the reducer
        tokencomp.patch(model, 0.5, reducer="uniform", proportional_attention=share).remove()


@two_families
def test_sizes_add_up_over_stages(name: str) -> None:
    """Merging again between layers starts from the sizes that merging at entry left."""
    family = FAMILIES[name]
    model, merge = family.build(), make_reducer("merge")
    plan = Plan((Stage(0, 0.5, merge), Stage(2, 0.25, merge)))
    with tokencomp.patch(model, plan=plan, proportional_attention=True) as handle:
        out = model(**family.batch(rows(family)), use_cache=True)
    layers = oracle.cache_of(out).layers
    for layer in (0, 1, 2, 3):
        for b, spans in enumerate(handle.stats.spans):
            real = slice(None) if layers[layer].valid is None else layers[layer].valid[b]
            sizes = layers[layer].sizes[b][real]
            text_rows = handle.stats.lengths[b] - sum(s.length for s in spans)
            assert float(sizes.sum()) - text_rows == sum(s.length for s in spans)


@two_families
def test_batch_equals_singles_and_beams(name: str) -> None:
    family = FAMILIES[name]
    model, data = family.build(), rows(family)
    options = dict(num_beams=3, num_return_sequences=2)
    with patched(model, MERGERS[0]):
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
    with patched(model, MERGERS[0]):
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
    with patched(model, MERGERS[0]), torch.no_grad():
        out = model(**family.batch([first]), position_ids=positions[..., :n], use_cache=True)
        turn = {**family.batch([second]), "attention_mask": whole["attention_mask"]}
        cache = oracle.cache_of(out)
        got = model(**turn, position_ids=positions[..., n:], past_key_values=cache).logits[:, -1]
        expected = model(**whole, position_ids=positions).logits[:, -1]
    assert (got - expected).abs().max() < 1e-5


@two_families
def test_cache_does_not_grow(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = family.batch(rows(family)[:1])
    with patched(model, MERGERS[0]) as handle:
        out = model(**inputs, use_cache=True)
    held = sum(t.nbytes for c in oracle.cache_of(out).layers for t in (c.keys, c.values))
    assert held == handle.stats.kv_bytes_after


@two_families
def test_leaves_no_trace(name: str, backend: str) -> None:
    """Ratio 0 is bit-identical, the model's config never changes, unpatch restores every module."""
    family = FAMILIES[name]
    model, inputs = family.build(backend), family.batch(rows(family))
    expected, before = model(**inputs).logits, [dict(m.__dict__) for m in model.modules()]
    config = copy.deepcopy(model.config.to_dict())
    handle = patched(model, MERGERS[0], 0.0)
    assert torch.equal(model(**inputs).logits, expected)
    assert model.config.to_dict() == config
    assert family.decoder(model).config._attn_implementation == backend
    handle.set(ratio=0.5)
    assert not torch.equal(model(**inputs).logits, expected)
    with handle.disabled():
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
    with patched(model, MERGERS[0]):
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
    with patched(model, MERGERS[0]), torch.no_grad():
        expected = oracle.generate(model, inputs).logits
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            got = oracle.generate(model, inputs).logits
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_widened_product(dim: int, dtype: torch.dtype) -> None:
    """scaling · q·k gains log(size), to far more digits than one number of the dtype has."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, dim, generator=g).to(dtype)
    k, v = (torch.randn(2, 2, 9, dim, generator=g).to(dtype) for _ in range(2))
    sizes = torch.randint(1, 400, (2, 7), generator=g).float()
    scaling = dim**-0.5
    wide_q, wide_k, wide_v = widen(q, k, v, sizes, scaling)
    assert wide_q.shape[-1] == wide_k.shape[-1] == wide_v.shape[-1] == dim + 8
    assert torch.equal(wide_v[..., :dim], v) and not wide_v[..., dim:].any()
    repeated = wide_k.repeat_interleave(2, 1).double()
    added = scaling * (wide_q[..., dim:].double() @ repeated[..., dim:].mT)
    wanted = torch.nn.functional.pad(sizes.double().log(), (0, 2))[:, None, None]
    assert (added - wanted).abs().max() < 2e-4


def tiny(model_type: str) -> Any:
    model_class = getattr(transformers, model_classes().get(model_type, ""), None)
    if model_class is None:
        pytest.skip("the release has no such type")
    return tiny_model(model_class, CONFIG_MAPPING[model_type](), variants(model_type)[0])


@pytest.mark.parametrize("model_type", ["mistral_large4", "hy_v4_vl"])
def test_attention_with_an_indexer_is_refused(model_type: str) -> None:
    """It masks what its indexer has not chosen under the names of known backends alone."""
    with pytest.raises(UnsupportedModelError, match="does not reach the attention of"):
        tokencomp.patch(tiny(model_type).model, 0.5, reducer="merge", proportional_attention=True)


@torch.no_grad()
def test_attention_by_another_name() -> None:
    """Layers of Nemotron-H call their attention a mixer, as they call their recurrence."""
    model = tiny("nemotron_h_omni")
    prompts = Prompts(model)
    attn = next(m for m in model.decoder.modules() if type(m).__name__ == "NemotronHAttention")
    seen: list[Any] = []
    attn.register_forward_hook(lambda *call: seen.append((call[2], call[3])), with_kwargs=True)
    with tokencomp.patch(model.whole, 0.5, reducer="merge", proportional_attention=True):
        out = prompts.forward(prompts.inputs([0]))
    (kwargs, (found, _)), layer = seen[-1], oracle.cache_of(out).layers[attn.layer_idx]
    x, sizes = kwargs["hidden_states"], layer.sizes
    assert sizes.max() > 2
    q, k, v = (
        p(x).unflatten(-1, (-1, attn.head_dim)) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    bias = torch.nn.functional.pad(sizes.log(), (0, x.shape[1] - sizes.shape[1]))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * attn.scaling + bias[:, None, None]
    logits = logits.masked_fill(~torch.ones(logits.shape[-2:]).tril().bool(), -torch.inf)
    expected = attn.o_proj(torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2))
    assert (found - expected).abs().max() < 1e-5


def test_refused_where_nothing_merges() -> None:
    model = FAMILIES["qwen2_vl"].build()
    for name in ("condiv", "random", "fastv", "condiv+fastv"):
        with pytest.raises(OptionError, match=f"'{name.replace('+', '.')}' merges no tokens"):
            tokencomp.patch(model, 0.5, reducer=name, proportional_attention=True)
    with pytest.raises(OptionError, match="merges no tokens"):
        plan = Plan((Stage(0, 0.5, make_reducer("uniform")),))
        tokencomp.patch(model, plan=plan, proportional_attention=True)
    handle = patched(model, MERGERS[0])
    with pytest.raises(OptionError, match="merges no tokens"):
        handle.set(reducer="random")
    assert handle.plan.entry.reducer.name == "merge"
