"""Tiny Qwen3.5: three layers of gated DeltaNet to one of full attention, Qwen3-VL's media.

Most layers keep a state of constant size instead of keys and values, so the question is whether
methods that were made for attention hold there.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from recipes.tiny.families.deltanet import segmented
from recipes.tiny.families.qwen3_vl import TinyQwen3VL


class TinyQwen35(TinyQwen3VL):
    """See :class:`~recipes.tiny.families.Family`."""

    card: ClassVar[dict[str, str]] = {
        "note": "Most of its layers keep a state of constant size instead of keys and values. It "
        "answers in one word and has not been taught option letters. Words on pictures, the order "
        "of events and repeated actions are not learned. The stage `finish` was added after the "
        "first card had shown that counts and small objects needed more; it started at the "
        "published weights. The command repeats the recipe, not these exact weights."
    }

    def config(self, tokenizer) -> dict[str, Any]:
        base = super().config(tokenizer)
        text, vision = base["text_config"], base["vision_config"]
        for name in ("rope_theta", "rope_scaling", "use_sliding_window"):
            del text[name]
        del vision["deepstack_visual_indexes"]
        # Half of a head turns with the position; published heads are wider and turn a quarter.
        rope = {
            "rope_type": "default",
            "rope_theta": 5000000.0,
            "partial_rotary_factor": 0.5,
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
        }
        text.update(
            model_type="qwen3_5_text",
            num_hidden_layers=8,
            intermediate_size=256,
            layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            linear_conv_kernel_dim=4,
            rope_parameters=rope,
        )
        vision["model_type"] = "qwen3_5"
        return {
            **base,
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
        }

    def build(self, tokenizer) -> torch.nn.Module:
        model: Any = super().build(tokenizer)
        for layer in model.model.language_model.layers:
            if hasattr(layer, "linear_attn"):
                _remember_long(layer.linear_attn)
        return model

    def hidden(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        """The linear layers run once over the media, then from its state over every question."""
        with segmented(model.model.language_model, inputs["attention_mask"]) as masks:
            return super().hidden(model, {**inputs, "attention_mask": masks})


def _remember_long(layer) -> None:
    """Start with time steps of 0.001 to 0.1, as Mamba-2 does: half-lives up to hundreds of tokens.

    transformers starts with steps of about 1, because it expects trained weights: what a token
    wrote into the state would be gone after the next one.
    """
    with torch.no_grad():
        steps = torch.empty_like(layer.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp_()
        layer.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
        layer.A_log.uniform_(1, 8).log_()


FAMILY = TinyQwen35()
