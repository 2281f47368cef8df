"""Logits processing: penalties, grammars, log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokencomp.serving.hf.queue import Job
from tokencomp.serving.hf.text import token_bytes

LOWEST = -9999.0  # log-probability of what cannot be; JSON knows no infinity


class BatchLogits(LogitsProcessor):
    """Records log-probabilities, applies the penalties of each request, and enforces grammars.

    Rows are independent of each other and of the padding, given by the attention mask (batch,
    prompt) `padded`. `repetition` is the default penalty of requests; 1 is off.
    """

    def __init__(
        self, batch: list[Job], padded: Tensor | None, repetition: float, tokenizer: Any
    ) -> None:
        self.batch, self.repetition, self.tokenizer = batch, repetition, tokenizer
        self.starts = [0] * len(batch) if padded is None else (padded != 0).int().argmax(1).tolist()
        self._width = None if padded is None else padded.shape[1]
        self._prompt: int | None = None  # columns of `input_ids` before the first generated token
        self._logprobs: Tensor | None = None

    @property
    def needed(self) -> bool:
        """Whether any request asks for something between logits and tokens."""
        return any(
            self._penalties(job) != (1, 0, 0) or job.grammar or job.prompt.request.logprobs
            for job in self.batch
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._prompt is None:
            self._prompt = input_ids.shape[1]
            if self._width not in (None, self._prompt):  # the model generates from embeddings
                self.starts = [0] * len(self.batch)
        if any(job.prompt.request.logprobs for job in self.batch):
            self._logprobs = torch.log_softmax(scores.float(), dim=-1)
        for row, job in enumerate(self.batch):
            if job.done:
                continue
            answer = input_ids[row, self._prompt :]
            self._penalise(scores[row], input_ids[row, self.starts[row] :], answer, job)
            if job.grammar is not None:
                job.grammar.mask(scores[row])
        return scores

    def _penalties(self, job: Job) -> tuple[float, float, float]:
        r = job.prompt.request
        own = self.repetition if r.repetition_penalty is None else r.repetition_penalty
        return own, r.presence_penalty or 0, r.frequency_penalty or 0

    def _penalise(self, scores: Tensor, seen: Tensor, answer: Tensor, job: Job) -> None:
        """Penalise tokens of `seen` (repetition) or of the answer, in place, as in vLLM."""
        repetition, presence, frequency = self._penalties(job)
        if repetition != 1:
            old = scores[seen]
            scores[seen] = torch.where(old < 0, old * repetition, old / repetition)
        if presence or frequency:
            tokens, counts = answer.unique(return_counts=True)
            scores[tokens] -= presence + frequency * counts.to(scores.dtype)

    def entry(self, row: int, token: int) -> dict[str, Any] | None:
        """Return OpenAI's object for the chosen token of a row, if the request asks for it."""
        request = self.batch[row].prompt.request
        if not request.logprobs or self._logprobs is None:
            return None
        values = self._logprobs[row]
        top = values.topk(request.top_logprobs or 0)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {
            **self._one(token, values[token].item()),
            "top_logprobs": [self._one(other, value) for other, value in pairs],
        }

    def _one(self, token: int, value: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        written = token_bytes(self.tokenizer, token, text)
        return {"token": text, "logprob": max(value, LOWEST), "bytes": [*written]}
