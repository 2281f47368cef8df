"""A stock FastVLM made of a real image encoder and a real language model.

`FastVlmForConditionalGeneration` of transformers, with EfficientNet-Lite0 (timm's
`tf_efficientnet_lite0`) as the tower and SmolLM2-135M-Instruct as the decoder. Only the projector
between them is new.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
)
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from recipes.photographs.scenes import SIZE
from tokencomp.errors import OptionError

CELL = 32  # px per visual token and side: the stride of the tower
IMAGE = "<image>"
ARCHITECTURE = "tf_efficientnet_lite0"
CHANNELS = 1280
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\nAnswer:' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>\n' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAnswer:' }}{% endif %}"
)
"""Picture, question, "Answer:", and the answer with a space before it, which makes it one token."""


class RoundedImages(BaseImageProcessor):
    """Pixels in [-1, 1]; both sides are rounded to whole tokens, and never enlarged beyond that.

    A picture of fewer pixels gives fewer tokens, so that downscaling is a baseline.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """float32 (images, 3, height, width). All pictures of a batch must have one size."""
        images = images if isinstance(images, list | tuple) else [images]
        return BatchFeature({"pixel_values": torch.stack([planes(image) for image in images])})


def planes(image: Image.Image | np.ndarray) -> torch.Tensor:
    """float32 (3, height, width) in [-1, 1], both sides multiples of `CELL`."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    size = tuple(min(SIZE, CELL * max(1, round(side / CELL))) for side in image.size)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def mapped(weights: Mapping[str, torch.Tensor], names: Mapping[str, torch.Tensor]) -> dict:
    """Weights of the package under timm's names: both list the same layers in the same order.

    Raises
    ------
    OptionError
        The two are not the same network.
    """
    pairs = list(zip(weights.items(), names.items(), strict=False))
    wrong = [f"{a} and {b}" for (a, x), (b, y) in pairs if x.shape != y.shape]
    if wrong or len(weights) != len(names):
        raise OptionError(
            f"the weights ({len(weights)} tensors) are not those of {ARCHITECTURE} ({len(names)} "
            f"tensors): {', '.join(wrong[:3]) or 'another number of tensors'}."
        )
    return {new: tensor for (_, tensor), (new, _) in pairs}


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """The processor of FastVLM, with the tokenizer and template of this model."""
    tokenizer.chat_template = TEMPLATE
    return LlavaProcessor(
        RoundedImages(),
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )


def fast_vlm(
    text_config: dict[str, Any], tower: dict[str, Any], image_token: int
) -> FastVlmForConditionalGeneration:
    """The stock class with a Llama decoder, random weights, float32."""
    config = FastVlmConfig(
        text_config=text_config,
        vision_config=tower,
        image_token_id=image_token,
        tie_word_embeddings=True,
    )
    return FastVlmForConditionalGeneration(config)


def assemble(tower: Path, language: Path) -> tuple[FastVlmForConditionalGeneration, Any]:
    """The model with both real parts and a random projector, float32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(language.parent, gguf_file=language.name)
    llm = AutoModelForCausalLM.from_pretrained(
        language.parent, gguf_file=language.name, dtype=torch.float32
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    llm.get_input_embeddings().weight.data[-1] = 0  # no prompt ever shows this row to the decoder
    text = llm.config.to_dict()
    text.pop("quantization_config", None)
    text["pad_token_id"] = tokenizer.pad_token_id
    vision = {
        "model_type": "timm_wrapper",
        "architecture": ARCHITECTURE,
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": CHANNELS,
    }
    model = fast_vlm(text, vision, tokenizer.convert_tokens_to_ids(IMAGE))
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.tie_weights()
    own = model.model.vision_tower.timm_model
    packaged = torch.load(tower, map_location="cpu", weights_only=True)
    body = {k: v for k, v in packaged.items() if not k.startswith("_fc.")}  # without classifier
    own.load_state_dict(mapped(body, own.state_dict()))
    return model, tokenizer


def last_blocks(model: FastVlmForConditionalGeneration) -> list[torch.nn.Module]:
    """The modules of the tower from stride 16 on, which are trained."""
    timm = model.model.vision_tower.timm_model
    return [*timm.blocks[4:], timm.conv_head, timm.bn2]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """A folder in the Hugging Face layout, bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[Any, LlavaProcessor]:
    """The model in eval mode, bfloat16, and its processor.

    Raises
    ------
    OptionError
        The folder does not hold the model.
    """
    if not (folder / "config.json").exists():
        raise OptionError(f"{folder} holds no model. Run: python -m recipes.photographs.build")
    model = FastVlmForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval(), build_processor(AutoTokenizer.from_pretrained(folder))
