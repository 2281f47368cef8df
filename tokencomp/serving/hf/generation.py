"""What the engine hands to `generate`: inputs, sampling, the end of rows; errors for clients."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from tokencomp.errors import ScoreError, TokenCompError, WeightsError
from tokencomp.inputs.prompts import chat_inputs, to_model
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.job import SAMPLING, Job
from tokencomp.serving.hf.logits import Steps
from tokencomp.serving.hf.metrics import Metrics
from tokencomp.serving.hf.prompt import Prompt


def build_inputs(model: Any, processor: Any, prompts: list[Prompt]) -> dict[str, Any]:
    """One left-padded batch on the model's device, of prompts with equal specs."""
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


class Rows(StoppingCriteria):
    """Called after every step: hands the new tokens out, and ends rows one by one.

    `batch` are the jobs in the order of the rows; `started` is called once the prefill has run.
    """

    def __init__(
        self,
        batch: list[Job],
        ends: set[int],
        started: Callable[[], None],
        metrics: Metrics,
        steps: Steps,
    ) -> None:
        self.batch, self.ends, self.started, self.metrics = batch, ends, started, metrics
        self.steps, self.begun = steps, False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.begun:
            self.started()
        self.begun = True
        for row, (job, token) in enumerate(zip(self.batch, input_ids[:, -1].tolist(), strict=True)):
            if job.done:
                continue
            self.metrics.generated.inc()
            job.add(token, token in self.ends, self.steps.entry(row, token))
            if job.done and job.usage is not None:
                seconds = time.monotonic() - job.arrived
                first = job.first - job.arrived
                self.metrics.count_answer(seconds, first, job.usage.completion)
        done = [job.done or job.cancelled for job in self.batch]
        return torch.tensor(done, device=input_ids.device)


# Logits divided by a smaller temperature overflow; sampling would only ever pick the top token.
COLDEST = 1e-5


def sampling(request: Any, config: Any) -> dict[str, Any]:
    """Generation arguments; fields that are left out have the value of the generation config.

    A config without `top_k` samples from all tokens, as in vLLM, and not from the 50 of `generate`.
    """
    values = {name: getattr(request, name) for name in SAMPLING}
    values = {name: value for name, value in values.items() if value is not None}
    if values.get("temperature", 1.0) < COLDEST:
        return {"do_sample": False}
    if not values and not config.do_sample:
        return {}
    values["top_k"] = max(values.get("top_k", config.top_k or 0), 0)  # vLLM's -1 is 0 here
    return {"do_sample": True, **values}


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed all generators, on every device, for the block; after it, nobody knows their state."""
    if seed is None:
        yield
        return
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.seed()  # else requests without a seed would repeat what follows this one


def take_end_tokens(model: Any) -> set[int]:
    """Return the model's end tokens and remove them from its generation config.

    `Rows` ends every row itself, because a request may ask to go on after an end token.
    """
    config = model.generation_config
    ends = getattr(config, "eos_token_id", None)
    if config.pad_token_id is None:  # generate would take the end token
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    config.eos_token_id = None
    return set([ends] if isinstance(ends, int) else ends or [])


def take_penalty(model: Any) -> float:
    """Return the model's repetition penalty and remove it from its generation config.

    `Steps` applies it to every row itself, because requests have penalties of their own.
    """
    config = model.generation_config
    penalty = getattr(config, "repetition_penalty", None)
    config.repetition_penalty = None if penalty is None else 1.0
    return 1.0 if penalty is None else float(penalty)


def for_client(error: BaseException) -> RequestError:
    """Return the error that the client of a failed request sees."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, WeightsError):  # its text names files of this machine
        return RequestError("this server has no trained weights for that reducer.")
    if isinstance(error, ScoreError):  # of the model in its dtype, not of the request
        return RequestError(f"the model cannot compress these media: {error}", 500)
    if isinstance(error, TokenCompError):
        return RequestError(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return RequestError("out of memory; send fewer or smaller media, or try again later.", 503)
    return RequestError(f"the model failed on this request ({type(error).__name__}).", 500)
