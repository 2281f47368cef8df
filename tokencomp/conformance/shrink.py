"""Tiny text configs of any model type: every size of a config replaced by a small one.

What distinguishes a type is kept: layer types, rotary tables, gates, norms, routing. Widths, counts
and windows shrink, by the name of their field.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

WIDTH, HEADS, HEAD_DIM, VOCABULARY, WINDOW = 128, 4, 32, 512, 8
# Fields of text configs, by what they count. A field that a config lacks, or has as None or 0,
# does not change.
BY_SIZE = (
    (WIDTH, "hidden_size dim d_model block_dim conv_dim conv_dim_out word_embed_proj_dim"),
    (96, "intermediate_size ffn_dim block_ff_dim intermediate_size_mlp"),
    (96, "dense_intermediate_size block_intermediate_size"),
    (32, "moe_intermediate_size shared_expert_intermediate_size share_expert_dim"),
    (32, "shared_intermediate_size moe_shared_expert_intermediate_size moe_latent_size"),
    (32, "shared_experts_intermediate_size moe_hidden_size"),
    (HEADS, "num_attention_heads mamba_num_heads linear_num_value_heads linear_num_heads"),
    (2, "num_key_value_heads num_global_key_value_heads linear_num_key_heads"),
    (HEAD_DIM, "head_dim global_head_dim mamba_head_dim index_head_dim"),
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim ssm_state_size"),
    (32, "kv_lora_rank q_lora_rank o_lora_rank qk_head_dim"),
    (16, "qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    # Few indexer heads tie at a score of zero, where even the whole model depends on its padding.
    (32, "index_n_heads"),
    (16, "index_topk"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_k top_k_experts moe_topk"),
    (1, "n_group topk_group n_groups num_shared_experts n_shared_experts"),
    (1, "first_k_dense_replace moe_num_shared_experts"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (8, "hidden_size_per_layer_input laurel_rank"),
    (WINDOW, "sliding_window attention_chunk_size"),
    (0, "num_kv_shared_layers"),
    (4096, "max_position_embeddings"),
)
SIZES = {name: size for size, names in BY_SIZE for name in names.split()}
KINDS = ("layer_types", "layers_block_type")
"""Names of the list with the kind of every layer."""
PER_LAYER = "per_layer_config"
"""Name of the mapping from numbers of layers to fields in which they differ from the others."""
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "decoder_layers")
NO_ARGUMENTS = (
    *("model_type", "transformers_version", "architectures", "_name_or_path", "dtype"),
    *("torch_dtype", "id2label", "label2id", "return_dict", "output_attentions"),
)


def tiny_text_config(config: Any, mrope: bool = False, **overrides: Any) -> Any:
    """A text config of the same class with small sizes, and at least two layers of every kind.

    `mrope`: the model has one row of positions per axis, also where the config gives no sections:
    those of a default config are for heads of 128 dimensions. Fields get the values of `overrides`.
    """
    values = {k: v for k, v in config.to_dict().items() if k not in NO_ARGUMENTS}
    listed = next((name for name in KINDS if overrides.get(name) or values.get(name)), KINDS[0])
    kinds = overrides.get(listed, values.get(listed))
    old_depth = next((values[name] for name in DEPTHS if name in values), 0)
    chosen = pick_layers(kinds) if kinds else list(range(min(4, old_depth or 4)))
    changed: dict[str, Any] = {name: len(chosen) for name in DEPTHS if name in values}
    for name, value in values.items():
        if isinstance(value, list) and name != listed:
            if len(value) in {old_depth, len(kinds or ())} - {0}:
                changed[name] = [SIZES.get(name, value[i]) for i in chosen]
            elif name in SIZES:  # by kind of expert
                changed[name] = [SIZES[name]] * len(value)
    changed |= small_sizes(values)
    if kinds:
        changed[listed] = [kinds[i] for i in chosen]
    if isinstance(values.get(PER_LAYER), dict):
        changed[PER_LAYER] = _layer_fields(values, chosen)
    changed |= overrides
    width = changed.get("head_dim") or WIDTH // HEADS
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), dict) and name not in overrides:
            changed[name] = tiny_rope(values[name], width, mrope)
    known = {k: v for k, v in changed.items() if k in values or k in overrides}
    try:
        return type(config)(**{**values, **known})
    except Exception:
        return type(config)(**known)


def small_sizes(values: Mapping[str, Any]) -> dict[str, int]:
    """The fields that give sizes, with small ones."""
    small = {
        name: SIZES[name]
        for name, value in values.items()
        if name in SIZES and value and not isinstance(value, bool | dict | list)
    }
    if values.get("kv_lora_rank"):  # latent attention has as many keys as queries
        small |= {"num_key_value_heads": HEADS, "head_dim": 16}
    return small


def _layer_fields(values: Mapping[str, Any], chosen: list[int]) -> dict[str, dict[str, int]]:
    """Small sizes of the chosen layers that differ from the others, by their new number."""
    own = {int(layer): fields for layer, fields in values[PER_LAYER].items()}
    result = {}
    for new, old in enumerate(chosen):
        if old in own:
            result[str(new)] = small_sizes({"kv_lora_rank": values.get("kv_lora_rank"), **own[old]})
            if "qk_nope_head_dim" in own[old]:
                result[str(new)]["head_dim"] = HEAD_DIM  # with and without rotation
    return result


def pick_layers(kinds: list[str]) -> list[int]:
    """Indices of at least four layers that contain every type at least twice, in order.

    A prefix up to the last new type would be long (Gemma: 5 to 1), so one layer of each type is
    taken, twice. With a single type, the first layers are taken: other per-layer settings
    (rotation, shared keys) differ between them.
    """
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    if len(first) == 1 and len(kinds) >= 4:
        return list(range(4))
    return first * max(2, math.ceil(4 / len(first)))


def tiny_rope(parameters: Mapping[str, Any], head_dim: int, mrope: bool = False) -> dict[str, Any]:
    """Rotary parameters (also per layer type) whose M-RoPE sections fit small heads."""
    result = copy.deepcopy(dict(parameters))
    if mrope and not any(isinstance(v, dict) for v in result.values()):
        result.setdefault("mrope_section", [22, 22, 20])
    for own in (result, *(v for v in result.values() if isinstance(v, dict))):
        section = own.get("mrope_section")
        if section:
            half = int(head_dim * own.get("partial_rotary_factor", 1.0)) // 2
            own["mrope_section"] = scaled_section(section, half)
    return result


def scaled_section(section: list[int], half: int) -> list[int]:
    """Sections in about the same proportion that sum to `half`; equal ones remain equal."""
    parts = [max(1, n * half // sum(section)) for n in section]
    alone = next((i for i, n in enumerate(section) if section.count(n) == 1), 0)
    parts[alone] += half - sum(parts)
    return parts
