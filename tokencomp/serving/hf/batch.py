"""From the prompts of a batch to model inputs."""

from __future__ import annotations

from typing import Any

from tokencomp.inputs.prompts import to_model
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.schema import Prompt


def build_inputs(model: Any, processor: Any, prompts: list[Prompt]) -> dict[str, Any]:
    """One left-padded batch on the model's device.

    Raises
    ------
    RequestError
        The chat template or the processor refuses a prompt.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    media: dict[str, Any] = {}
    images = [image for prompt in prompts for image in prompt.images]
    videos = [video for prompt in prompts for video in prompt.videos]
    if images:
        media["images"] = images
    if videos:
        media.update(videos=videos, do_sample_frames=False)
    try:
        texts = [
            processor.apply_chat_template(p.chat, add_generation_prompt=True, tokenize=False)
            for p in prompts
        ]
        inputs = dict(processor(text=texts, padding=True, return_tensors="pt", **media))
    except Exception as error:  # templates and processors raise whatever they like
        raise RequestError(f"the model's processor refuses the prompt: {error}") from error
    return to_model(inputs, model)
