"""Real model shapes with random weights: speed and memory can be measured without any checkpoint.

Never for accuracy. Sizes are those of the published configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokencomp.errors import OptionError, unknown_name

QWEN_VOCAB, IMAGE, VIDEO, START, END = 151936, 151655, 151656, 151652, 151653
TEXT_BEFORE, TEXT_AFTER = 16, 48
STAMP, NEWLINE = (300, 301, 302, 303, 304, 305), 198


@dataclass(frozen=True)
class Shape:
    """Sizes of one published model.

    Attributes
    ----------
    family
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision" or "vila".
    hidden, intermediate, layers, heads, kv_heads
        Text decoder.
    tied
        Input and output embeddings share their weights.
    large_tower
        The larger of the two vision towers of Qwen3-VL.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = True
    large_tower: bool = False


@dataclass(frozen=True)
class Architecture:
    """How a family is built from a shape, and what one of its prompts looks like."""

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


def _mrope(*sections: int, theta: float = 1e6, **more: Any) -> dict[str, Any]:
    """The rotary options under the name that this transformers release reads."""
    import inspect

    import transformers

    section = {"mrope_section": list(sections), **more}
    parameters = inspect.signature(transformers.Qwen2Config.__init__).parameters
    if "rope_theta" in parameters:
        scaling = {"type": "mrope", "rope_type": "default", **section}
        return {"rope_theta": theta, "rope_scaling": scaling}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **section}}


_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _qwen(name: str, shape: Shape, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """Model of the classes that begin with `name`."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **_QWEN_TOKENS
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _qwen2_vl(shape: Shape, layers: int, vision_layers: int | None) -> Any:
    depth = 32 if vision_layers is None else vision_layers
    tower = {"depth": depth, "embed_dim": 1280, "hidden_size": shape.hidden, "num_heads": 16}
    text = {**_text(shape, layers), **_mrope(16, 24, 24)}
    return _qwen("Qwen2VL", shape, text, {**tower, "mlp_ratio": 4})


def _qwen2_5_vl(shape: Shape, layers: int, vision_layers: int | None) -> Any:
    depth = 32 if vision_layers is None else vision_layers
    tower = {"depth": depth, "out_hidden_size": shape.hidden, "intermediate_size": 3420}
    return _qwen("Qwen2_5_VL", shape, {**_text(shape, layers), **_mrope(16, 24, 24)}, tower)


def _qwen3_vl(shape: Shape, layers: int, vision_layers: int | None) -> Any:
    """Fewer vision layers keep the deepstack features that are left, at least one."""
    tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    deepstack = [5, 11, 17]
    if shape.large_tower:
        tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
        deepstack = [8, 16, 24]
    depth = vision_layers or tower["depth"]
    deepstack = [k for k in deepstack if k < depth] or [depth - 1]
    vision = {**tower, "depth": depth, "patch_size": 16, "out_hidden_size": shape.hidden}
    text = {**_text(shape, layers), "head_dim": 128}
    text |= _mrope(24, 20, 20, theta=5e6, mrope_interleaved=True)
    return _qwen("Qwen3VL", shape, text, {**vision, "deepstack_visual_indexes": deepstack})


def _prompt(video: list[int], device: str) -> dict[str, Any]:
    ids = torch.tensor([[*range(100, 100 + TEXT_BEFORE), *video, *range(200, 200 + TEXT_AFTER)]])
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def _qwen_video(pairs: int, side: int, patch: int, dtype: torch.dtype, device: str) -> Any:
    """Grid and pixels of a video of frame pairs, each of side × side tokens."""
    size = (pairs * 4 * side * side, 2 * 3 * patch * patch)
    return {
        "pixel_values_videos": torch.randn(size, dtype=dtype, device=device),
        "video_grid_thw": torch.tensor([[pairs, 2 * side, 2 * side]], device=device),
    }


def _pairs(tokens: int) -> tuple[int, int]:
    """Frame pairs of 16×16 tokens, or one smaller pair: how many, and their side."""
    side = 16 if tokens >= 256 else max(1, round(tokens**0.5))
    return max(1, round(tokens / side**2)), side


def _qwen_inputs(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """A video of 448 px, all its tokens in one run."""
    pairs, side = _pairs(tokens)
    prompt = _prompt([START, *[VIDEO] * (pairs * side * side), END], device)
    types = (prompt["input_ids"] == VIDEO).int() * 2
    return {**prompt, "mm_token_type_ids": types, **_qwen_video(pairs, side, 14, dtype, device)}


def _qwen3_inputs(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """A video of 512 px, a timestamp of some tokens before every frame pair."""
    pairs, side = _pairs(tokens)
    frames = [[*STAMP, START, *[VIDEO] * (side * side), END] for _ in range(pairs)]
    prompt = _prompt([token for frame in frames for token in frame], device)
    types = (prompt["input_ids"] == VIDEO).int() * 2
    return {**prompt, "mm_token_type_ids": types, **_qwen_video(pairs, side, 16, dtype, device)}


def _siglip(pixels: int, layers: int) -> Any:
    import transformers

    return transformers.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=pixels,
        patch_size=14,
    )


def _llava_onevision(shape: Shape, layers: int, vision_layers: int | None) -> Any:
    import transformers

    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**_text(shape, layers)),
        vision_config=_siglip(384, 26 if vision_layers is None else vision_layers),
        image_token_id=151646,  # type: ignore[call-arg]  # a field of its dataclass
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


def _vila(shape: Shape, layers: int, vision_layers: int | None) -> Any:
    """NVILA-Lite: 448 px, 3×3 patches to a token; the last vision layer is not used."""
    import transformers

    from tokencomp.models import VilaConfig, VilaForConditionalGeneration

    config = VilaConfig(
        text_config=transformers.Qwen2Config(**_text(shape, layers)),
        vision_config=_siglip(448, 27 if vision_layers is None else vision_layers),
        projector_type="mlp_downsample_3x3_fix",
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_ends=([], [NEWLINE]),
        video_ends=([], [NEWLINE]),
    )
    return VilaForConditionalGeneration(config)


def _vila_inputs(tokens: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Frames of 11×11 tokens, a line break after each."""
    frames = max(1, round(tokens / 121))
    return {
        **_prompt([*[VIDEO] * 121, NEWLINE] * frames, device),
        "pixel_values_videos": torch.randn(frames, 3, 448, 448, dtype=dtype, device=device),
        "video_frames": torch.tensor([frames], device=device),
    }


ARCHITECTURES = {
    "qwen2_vl": Architecture(_qwen2_vl, _qwen_inputs),
    "qwen2_5_vl": Architecture(_qwen2_5_vl, _qwen_inputs),
    "qwen3_vl": Architecture(_qwen3_vl, _qwen3_inputs),
    "vila": Architecture(_vila, _vila_inputs),
    "llava_onevision": Architecture(_llava_onevision, _llava_inputs),
}


SHAPES = {
    "tiny": Shape("qwen2_vl", 256, 64, 2, 2, 1),  # of no model, for rehearsals
    "llava-onevision-0.5b": Shape("llava_onevision", 896, 4864, 24, 14, 2),
    "llava-onevision-7b": Shape("llava_onevision", 3584, 18944, 28, 28, 4, tied=False),
    "qwen2-vl-2b": Shape("qwen2_vl", 1536, 8960, 28, 12, 2),
    "qwen2-vl-7b": Shape("qwen2_vl", 3584, 18944, 28, 28, 4, tied=False),
    "qwen2.5-vl-3b": Shape("qwen2_5_vl", 2048, 11008, 36, 16, 2),
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", 3584, 18944, 28, 28, 4, tied=False),
    "qwen3-vl-2b": Shape("qwen3_vl", 2048, 6144, 28, 16, 8),
    "qwen3-vl-4b": Shape("qwen3_vl", 2560, 9728, 36, 32, 8),
    "qwen3-vl-8b": Shape("qwen3_vl", 4096, 12288, 36, 32, 8, tied=False, large_tower=True),
    "nvila-lite-2b": Shape("vila", 1536, 8960, 28, 12, 2),
    "nvila-lite-8b": Shape("vila", 3584, 18944, 28, 28, 4, tied=False),
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
        Requested number of visual tokens; the nearest whole number of frames is taken.
    layers, vision_layers
        Fewer decoder or vision layers than published; None for all.

    Raises
    ------
    UnknownNameError, OptionError
        An unknown name; less than one token.
    """
    if name not in SHAPES:
        raise unknown_name("configuration", name, SHAPES)
    if tokens < 1:
        raise OptionError(f"tokens={tokens}: expected a positive number of visual tokens.")
    shape, make = SHAPES[name], ARCHITECTURES[SHAPES[name].family]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make.model(shape, layers or shape.layers, vision_layers).eval()
    finally:
        torch.set_default_dtype(before)
    return model, make.inputs(tokens, dtype, device)


def accepted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without those that this transformers release does not know (mm_token_type_ids)."""
    import inspect

    known = inspect.signature(type(model).forward).parameters
    return {k: v for k, v in inputs.items() if k in known}


def qwen2_vl(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    *,
    sections: Sequence[int],
    ids: dict[str, int],
    theta: float = 1e6,
    tied: bool = False,
    **vision: int,
) -> Any:
    """The model, by the sizes of its decoder; its tower has one layer.

    Parameters
    ----------
    sections
        Of M-RoPE: half dimensions of a head for time, height and width.
    ids
        Special tokens by their names in the configuration, such as `image_token_id`.
    vision
        Values of the tower's configuration that differ from the usual ones.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": [*sections]}
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rope_parameters": rope,
    }
    tower = {"depth": 1, "embed_dim": 32, "hidden_size": hidden, "num_heads": 2, **vision}
    config = Qwen2VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied, **ids)
    return Qwen2VLForConditionalGeneration(config).eval()
