"""What happens between the logits of the model and the choice of the next token, row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokencomp.serving.hf.job import Job

LOWEST = -9999.0  # log-probability of what cannot be; JSON knows no infinity


class Steps(LogitsProcessor):
    """Notes log-probabilities, penalises repetition and follows grammars.

    Rows do not depend on each other, nor on the padding of the batch, whose attention mask (batch,
    prompt) is `padded`. `penalty` is for requests that name none; 1 is off.
    """

    def __init__(self, batch: list[Job], padded: Tensor | None, penalty: float, tokenizer: Any):
        own = [job.prompt.request.repetition_penalty for job in batch]
        self.batch, self.tokenizer = batch, tokenizer
        self.penalties = [penalty if value is None else value for value in own]
        self.starts = [0] * len(batch) if padded is None else (padded != 0).int().argmax(1).tolist()
        self._width = None if padded is None else padded.shape[1]
        self._logprobs: Tensor | None = None

    @property
    def needed(self) -> bool:
        """Whether any request asks for something between logits and tokens."""
        return any(penalty != 1 for penalty in self.penalties) or any(
            job.grammar is not None or job.prompt.request.logprobs for job in self.batch
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._width not in (None, input_ids.shape[1]):  # a model that generates from embeddings
            self.starts = [0] * len(self.batch)
        self._width = None
        if any(job.prompt.request.logprobs for job in self.batch):
            self._logprobs = torch.log_softmax(scores.float(), dim=-1)
        for row, job in enumerate(self.batch):
            if job.done:
                continue
            if self.penalties[row] != 1:
                seen = input_ids[row, self.starts[row] :]
                old = scores[row, seen]
                factor = self.penalties[row]
                scores[row, seen] = torch.where(old < 0, old * factor, old / factor)
            if job.grammar is not None:
                job.grammar.mask(scores[row])
        return scores

    def entry(self, row: int, token: int) -> dict[str, Any] | None:
        """Return OpenAI's object for the chosen token of a row, if the request asks for it."""
        request = self.batch[row].prompt.request
        if not request.logprobs or self._logprobs is None:
            return None
        values = self._logprobs[row]
        top = values.topk(request.top_logprobs or 0)
        return {
            **self._one(token, values[token].item()),
            "top_logprobs": [
                self._one(t, v)
                for t, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ],
        }

    def _one(self, token: int, value: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": max(value, LOWEST), "bytes": list(text.encode())}
