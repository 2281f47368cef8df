"""How attention gets the weights of `merge=True`, in modules of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import kinds, oracle
from support.families import EOS, PAD, VOCAB, text
from support.family.llava import Llava
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokencomp
from benchmarks.conformance.run import model_classes
from benchmarks.conformance.variants import variants
from tokencomp.conformance.build import tiny_model
from tokencomp.conformance.prompts import Prompts
from tokencomp.engine.weights import bias_dims, widen
from tokencomp.errors import UnsupportedModelError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_widened_product(dim: int, dtype: torch.dtype) -> None:
    """scaling · q·k gains log(size), to far more digits than one number of the dtype has."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, dim, generator=g).to(dtype)
    k, v = (torch.randn(2, 2, 9, dim, generator=g).to(dtype) for _ in range(2))
    sizes = torch.randint(1, 400, (2, 7), generator=g).float()
    scaling = dim**-0.5
    wide_q, wide_k, wide_v = widen(q, k, v, bias_dims(q, k, sizes, scaling))
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
    with pytest.raises(UnsupportedModelError, match="do not reach the attention of"):
        tokencomp.patch(tiny(model_type).model, 0.5, reducer="kcenter", merge=True)
    handle = tokencomp.patch(tiny(model_type).model, 0.5, reducer="kcenter", merge="auto")
    assert not handle.plan.may_merge


@torch.no_grad()
def test_attention_by_another_name() -> None:
    """Layers of Nemotron-H call their attention a mixer, as they call their recurrence."""
    model = tiny("nemotron_h_omni")
    prompts = Prompts(model)
    attn = next(m for m in model.decoder.modules() if type(m).__name__ == "NemotronHAttention")
    seen: list[Any] = []
    attn.register_forward_hook(lambda *call: seen.append((call[2], call[3])), with_kwargs=True)
    with tokencomp.patch(model.whole, 0.5, reducer="kcenter", merge=True):
        out = prompts.forward(prompts.inputs([0]))
    (kwargs, (found, _)), layer = seen[-1], oracle.cache_of(out).layers[attn.layer_idx]
    _, counts = layer.row_map.columns[0].unique_consecutive(return_counts=True)
    x, sizes = kwargs["hidden_states"], counts[None].float()
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


class LlavaJetMoe(Llava):
    """Its attention calls `view` on what the backend returns."""

    def config(self) -> Any:
        config = super().config()
        config.text_config = transformers.JetMoeConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_key_value_heads=2, kv_channels=16, num_local_experts=4, num_experts_per_tok=2,
            bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        return config


@torch.no_grad()
def test_what_attention_returns_is_contiguous() -> None:
    family = LlavaJetMoe()
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(4, 3)]])
    with tokencomp.patch(model, 0.75, reducer="kcenter", merge=True) as handle:
        found = model(**inputs, use_cache=False).logits[:, -1]
        masks = oracle.kept_columns(handle, inputs, family.layers)
    merged, none = oracle.Merged(handle), torch.zeros(1, 0, dtype=torch.long)
    expected = kinds.expected_logits(model, family, inputs, masks, none, merged)[:, -1]
    assert (found - expected).abs().max() < 5e-5
