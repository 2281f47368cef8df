"""From the prompts of a batch to model inputs."""

from __future__ import annotations

from typing import Any

from tokencomp.inputs.prompts import chat_inputs, to_model
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.prompt import Prompt


def build_inputs(model: Any, processor: Any, prompts: list[Prompt]) -> dict[str, Any]:
    """One left-padded batch on the model's device, of prompts with equal specs.

    Raises
    ------
    RequestError
        The processor refuses a prompt.
    """
    images = [image for prompt in prompts for image in prompt.images]
    videos = [video for prompt in prompts for video in prompt.videos]
    samplings = [sampling for prompt in prompts for sampling in prompt.samplings]
    try:
        chats = [prompt.chat for prompt in prompts]
        texts = [prompt.text for prompt in prompts]
        inputs = chat_inputs(processor, chats, images, videos, samplings, texts)
    except Exception as error:  # processors raise undocumented types
        raise RequestError(f"the model's processor refuses the prompt: {error}") from error
    return to_model(inputs, model)
