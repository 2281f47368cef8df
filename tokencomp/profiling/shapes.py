"""Real model shapes with random weights: speed and memory can be measured without any checkpoint.

Never for accuracy. Sizes are those of the published configurations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tokencomp.errors import OptionError, unknown_name

QWEN_VOCAB, IMAGE, VIDEO, START, END = 151936, 151655, 151656, 151652, 151653
TEXT_BEFORE, TEXT_AFTER = 16, 48


@dataclass(frozen=True)
class Shape:
    """Sizes of one published model.

    Attributes
    ----------
    family
        "qwen2_vl", "qwen2_5_vl" or "llava_onevision".
    hidden, intermediate, layers, heads, kv_heads
        Text decoder.
    tied
        Input and output embeddings share their weights.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = True


SHAPES = {
    "llava-onevision-0.5b": Shape("llava_onevision", 896, 4864, 24, 14, 2),
    "llava-onevision-7b": Shape("llava_onevision", 3584, 18944, 28, 28, 4, tied=False),
    "qwen2-vl-2b": Shape("qwen2_vl", 1536, 8960, 28, 12, 2),
    "qwen2-vl-7b": Shape("qwen2_vl", 3584, 18944, 28, 28, 4, tied=False),
    "qwen2.5-vl-3b": Shape("qwen2_5_vl", 2048, 11008, 36, 16, 2),
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", 3584, 18944, 28, 28, 4, tied=False),
}


def build(
    name: str,
    tokens: int,
    *,
    layers: int | None = None,
    vision_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Any, dict[str, Any]]:
    """A model of that shape, and the inputs of one prompt with a video.

    Parameters
    ----------
    name
        One of `SHAPES`.
    tokens
        Visual tokens wanted; the nearest whole number of frames is taken.
    layers, vision_layers
        Fewer decoder or vision layers than published; None for all.

    Raises
    ------
    UnknownNameError, OptionError
        An unknown name; fewer tokens than one frame has.
    """
    if name not in SHAPES:
        raise unknown_name("configuration", name, SHAPES)
    if tokens < 1:
        raise OptionError(f"tokens={tokens}: expected a positive number of visual tokens.")
    shape, make = SHAPES[name], _FAMILIES[SHAPES[name].family]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make.model(shape, layers or shape.layers, vision_layers).eval()
    finally:
        torch.set_default_dtype(before)
    return model, make.inputs(tokens, dtype, device)


@dataclass(frozen=True)
class _Family:
    model: Callable[[Shape, int, int | None], Any]
    inputs: Callable[[int, torch.dtype, str], dict[str, Any]]


def _text(shape: Shape, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": QWEN_VOCAB,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": shape.tied,
    }


def _mrope() -> dict[str, Any]:
    """The rotary options under the name that this transformers release reads."""
    import inspect

    import transformers

    section = {"mrope_section": [16, 24, 24]}
    parameters = inspect.signature(transformers.Qwen2Config.__init__).parameters
    if "rope_theta" in parameters:
        scaling = {"type": "mrope", "rope_type": "default", **section}
        return {"rope_theta": 1e6, "rope_scaling": scaling}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **section}}


_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _qwen2_vl(shape: Shape, layers: int, vision_layers: int | None) -> Any:
    import transformers

    config = transformers.Qwen2VLConfig(
        text_config={**_text(shape, layers), **_mrope()},
        vision_config={
            "depth": 32 if vision_layers is None else vision_layers,
            "embed_dim": 1280,
            "hidden_size": shape.hidden,
            "num_heads": 16,
            "mlp_ratio": 4,
        },
        tie_word_embeddings=shape.tied,
        **_QWEN_TOKENS,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(shape: Shape, layers: int, vision_layers: int | None) -> Any:
    import transformers

    config = transformers.Qwen2_5_VLConfig(
        text_config={**_text(shape, layers), **_mrope()},
        vision_config={
            "depth": 32 if vision_layers is None else vision_layers,
            "out_hidden_size": shape.hidden,
            "intermediate_size": 3420,
        },
        tie_word_embeddings=shape.tied,
        **_QWEN_TOKENS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _prompt(video: list[int], device: str) -> dict[str, Any]:
    ids = torch.tensor([[*range(100, 100 + TEXT_BEFORE), *video, *range(200, 200 + TEXT_AFTER)]])
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def _qwen_inputs(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Frame pairs of 16×16 tokens (448 px), or one smaller pair."""
    side = 16 if tokens >= 256 else max(1, round(tokens**0.5))
    pairs = max(1, round(tokens / side**2))
    made = _prompt([START, *[VIDEO] * (pairs * side * side), END], device)
    types = (made["input_ids"] == VIDEO).int() * 2
    return {
        **made,
        "mm_token_type_ids": types,
        "pixel_values_videos": torch.randn(
            pairs * 4 * side * side, 1176, dtype=dtype, device=device
        ),
        "video_grid_thw": torch.tensor([[pairs, 2 * side, 2 * side]], device=device),
    }


def _llava_onevision(shape: Shape, layers: int, vision_layers: int | None) -> Any:
    import transformers

    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**_text(shape, layers)),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26 if vision_layers is None else vision_layers,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        ),
        image_token_id=151646,  # type: ignore[call-arg]
        video_token_id=151647,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=shape.tied,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _llava_inputs(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Frames of 14×14 tokens and one line break."""
    frames = max(1, round(tokens / 196))
    pixels = torch.randn(1, frames, 3, 384, 384, dtype=dtype, device=device)
    return {**_prompt([151647] * (196 * frames + 1), device), "pixel_values_videos": pixels}


_FAMILIES = {
    "qwen2_vl": _Family(_qwen2_vl, _qwen_inputs),
    "qwen2_5_vl": _Family(_qwen2_5_vl, _qwen_inputs),
    "llava_onevision": _Family(_llava_onevision, _llava_inputs),
}


def accepted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without those that this transformers release does not know (mm_token_type_ids)."""
    import inspect

    known = inspect.signature(type(model).forward).parameters
    return {k: v for k, v in inputs.items() if k in known}
