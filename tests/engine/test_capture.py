"""Queries and keys of any attention module against the weights of its own eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tokencomp.engine.capture import attention_of, capture_qk
from tokencomp.engine.rowmap import RowMap
from tokencomp.engine.scores import input_scores, layer_scores
from tokencomp.errors import UnsupportedModelError
from tokencomp.tokens.signals import Attention
from tokencomp.tokens.spans import VisualSpan
from tokencomp.torchlib.compat import CACHE_NAMES

SIZES: dict[str, Any] = dict(
    vocab_size=40, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, attn_implementation="eager",
)  # fmt: skip
LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
SCALED = {
    "sliding_window": None,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 8,
    },
}  # fmt: skip
INDEXED = {**LATENT, "layer_types": ["indexed_attention"] * 2, "index_n_heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": FULL,  # norms of queries and keys
    "Cohere2": FULL,  # no rotation in layers of this kind
    "DeepseekV3": LATENT,
    "Ministral3": SCALED,
    "Gemma3Text": {**FULL, "query_pre_attn_scalar": 32},
    "Qwen3_5Text": FULL,  # the query projection makes a gate too
    "Glm4": {},  # pairs are interleaved, only a part is rotated
    "Dots3NoteText": {  # layers differ in their heads, and an indexer reads the mask
        **INDEXED,
        "layer_types": ["sliding_attention", "indexed_attention"],
        "per_layer_config": {
            "0": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
            | {"kv_lora_rank": 24}
        },
    },
    "MistralLarge4Text": {  # the last layer follows the indexer of the one before
        **INDEXED,
        "indexer_types": ["full", "shared"],
        "no_rope_layers": [1, 1],
    },
}


def decoder(name: str) -> Any:
    config_class = getattr(transformers, f"{name}Config", None)
    model_class = getattr(transformers, f"{name}Model", None)
    if config_class is None or model_class is None:
        pytest.skip("the release has no such decoder")
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **DECODERS[name]})).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


def run(model: Any, x: Tensor, cache: Any = None) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """The last layer's attention module, the arguments of its call, and its weights."""
    seen: dict[str, Any] = {}
    attn = attention_of(model.layers[-1])

    def note(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen.update(kwargs=kwargs, weights=out[1])

    handle = attn.register_forward_hook(note, with_kwargs=True)
    model(inputs_embeds=x, use_cache=cache is not None, past_key_values=cache)
    handle.remove()
    return attn, seen["kwargs"], seen["weights"]


@pytest.mark.parametrize("name", list(DECODERS))
@torch.no_grad()
def test_weights_are_those_of_eager_attention(name: str) -> None:
    """Whole, and as two calls that leave out what they do not need."""
    model, x = decoder(name), torch.randn(1, 14, 64)
    attn, kwargs, weights = run(model, x)
    before = vars(attn.config).copy()
    left_out = ("hidden_states", "attention_mask", *CACHE_NAMES)
    arguments = {k: v for k, v in kwargs.items() if k not in left_out}
    whole = capture_qk(attn, attn, kwargs["hidden_states"], arguments)
    q = capture_qk(attn, attn, kwargs["hidden_states"], arguments, ("k_proj", "v_proj")).query
    k = capture_qk(attn, attn, kwargs["hidden_states"], arguments, ("q_proj", "v_proj")).key
    assert torch.equal(q, whole.query) and torch.equal(k, whole.key)
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * whole.scaling
    logits = logits.masked_fill(~torch.ones(14, 14).tril().bool(), -torch.inf)
    assert (logits.softmax(-1) - weights).abs().max() < 1e-6
    assert vars(attn.config) == before and "forward" not in vars(attn)


@pytest.mark.parametrize(
    "name", ["Llama", "DeepseekV3", "Ministral3", "Dots3NoteText", "MistralLarge4Text"]
)
@torch.no_grad()
def test_scores_behind_an_earlier_turn(name: str) -> None:
    """Scores after the call, and ahead of it, where the cache may hold latents instead of keys."""
    model, x, past = decoder(name), torch.randn(1, 20, 64), 6
    _, _, dense = run(model, x)
    span = VisualSpan(3, 5, (1, 1, 5))
    expected = dense[0, :, past + 8 :, past + 3 : past + 8].mean((0, 1))
    layout = RowMap.of_prompt(14, [14], [[span]])
    cache = transformers.DynamicCache(config=model.config)
    run(model, x[:, :past], cache)
    inputs: dict[str, Any] = {}

    def ahead(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        signal = Attention("text")
        inputs["ahead"] = input_scores(module, hidden, kwargs, signal, layout, cache, 1)

    handle = model.layers[-1].register_forward_pre_hook(ahead, with_kwargs=True)
    attn, kwargs, _ = run(model, x[:, past:], cache)
    handle.remove()
    behind = layer_scores(attn, kwargs, Attention("text"), layout)
    assert (inputs["ahead"] - expected).abs().max() < 1e-6
    assert (behind - expected).abs().max() < 1e-6
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_only_the_voting_rows_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of the text behind the span, keys of all rows, values and outputs of none."""
    model, x = decoder("Llama"), torch.randn(1, 14, 64)
    layer, rows = model.layers[0], dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 0)
    for name in rows:

        def count(module: Any, args: Any, out: Any, name: str = name) -> None:
            rows[name] += args[0].shape[1]

        getattr(layer.self_attn, name).register_forward_hook(count)
    layout = RowMap.of_prompt(14, [14], [[VisualSpan(3, 5, (1, 1, 5))]])
    tables = {"position_embeddings": model.rotary_emb(x, torch.arange(14)[None])}
    input_scores(layer, x, tables, Attention("text"), layout)
    assert rows == {"q_proj": 6, "k_proj": 14, "v_proj": 0, "o_proj": 0}


@torch.no_grad()
def test_logits_that_scores_do_not_know_are_refused() -> None:
    if not hasattr(transformers, "Gemma2Model"):
        pytest.skip("the release has no such decoder")
    DECODERS["Gemma2"] = {**FULL, "attn_logit_softcapping": 30.0}
    model = decoder("Gemma2")
    del DECODERS["Gemma2"]
    attn, kwargs, _ = run(model, torch.randn(1, 5, 64))
    arguments = {"position_embeddings": kwargs.get("position_embeddings")}
    with pytest.raises(UnsupportedModelError, match="softcap"):
        capture_qk(attn, attn, kwargs["hidden_states"], arguments)
