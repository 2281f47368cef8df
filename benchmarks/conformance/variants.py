"""What the default config of a type leaves out, or has only one of several forms of."""

from __future__ import annotations

from typing import Any

from tokencomp.conformance.variants import PLAIN, WITHOUT_TEXT, Variant

FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}

# Windows and biases that bind in short prompts.
INKLING = {
    "sliding_window_size": 8,
    "rel_extent": 12,
    "d_rel": 8,
    "swa_head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
}
SCALED = {"log_scaling_n_floor": 16}  # queries are scaled by their position from there on
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

VARIANTS: dict[str, Variant | tuple[Variant, ...]] = {
    **WITHOUT_TEXT,
    # Checkpoints have layer types that the default config does not.
    "step3p7": Variant(text={"layer_types": [FULL, SLIDING] * 2, "sliding_window": 8}),
    # transformers clips the time steps of Mamba-2 from below in the prefill, and not in decoding:
    # logits differ by 1e-3 without any compression.
    **dict.fromkeys(("nemotron_h_omni", "nemo_speechlm"), Variant(text={"time_step_min": 1e-9})),
    "lfm2_vl": Variant(text={"layer_types": ["conv", "conv", FULL, "conv"]}),
    "cohere_compass": Variant(
        text={
            "layer_types": [SLIDING, FULL] * 2,
            "rope_parameters": {
                SLIDING: {**PLAIN_ROPE, "mrope_section": [6, 5, 5]},
                FULL: {**PLAIN_ROPE, "mrope_section": [6, 5, 5]},
            },
        }
    ),
    # Defaults of a real checkpoint without which the class cannot be created.
    "deepseek_ocr2": Variant(
        text={"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2}
    ),
    "hunyuan_vl": Variant(
        text={
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_parameters": {**PLAIN_ROPE, "mrope_section": [4, 4, 4, 4]},
        }
    ),
    "diffusion_gemma": Variant(
        text={"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    ),
    "minimax_m3_vl": Variant(
        text={
            "layer_types": [FULL, "minimax_m3_sparse"] * 2,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "index_local_blocks": 1,
        }
    ),
    "inkling_mm_model": Variant(text=INKLING),
    "inkling2": Variant(text={**INKLING, **SCALED}),
    "inkling2_loop": Variant(
        text={
            **INKLING,
            **SCALED,
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 3,
            "loop_num_passes": 2,
        }
    ),
    "unlimited_ocr": Variant(text={"num_key_value_heads": 4}),
    "qwen4_exp": (
        Variant(text=QWEN4),
        Variant(
            "hashed n-grams",
            text={
                **QWEN4,
                "ple_layer_ids": [1, 3],
                "eos_token_id": 2,
                "ple_embed_dim": 32,
                "ngram_vocab_size_base": 64,
                "split_ngram_parts": 1,
            },
        ),
    ),
    # One type, several mechanisms.
    "gemma4": (
        Variant(),
        Variant("per-layer inputs, shared keys", text={"num_kv_shared_layers": 2}),
        Variant("image blocks", text={"use_bidirectional_attention": "vision"}),
    ),
}


def variants(model_type: str) -> tuple[Variant, ...]:
    """The forms of a type that are checked; one with nothing set for most types."""
    found = VARIANTS.get(model_type, PLAIN)
    return (found,) if isinstance(found, Variant) else found
