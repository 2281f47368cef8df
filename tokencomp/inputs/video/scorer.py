"""The default scorer of frames: the embeddings of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokencomp.adapters.registry import adapter_for
from tokencomp.inputs.prompts import build_inputs, to_model
from tokencomp.inputs.video.frames import Frames, Scored, frame_policy

ROWS = 16


def with_scorer(frames: Frames, model: Any, processor: Any) -> Frames:
    """`frames`, with this model as scorer if it is a policy by scores without one."""
    policy = frame_policy(frames)
    if isinstance(policy, Scored) and policy.scorer is None:
        return dataclasses.replace(policy, scorer=EmbeddingScorer(model, processor))
    return frames


class EmbeddingScorer:
    """Similarity of a frame to the question, by embeddings of the model.

    The largest cosine between a visual token at the decoder's input and the mean of the text. Every
    candidate passes through the vision tower once, and through no decoder layer.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.adapter = adapter_for(model)

    def __call__(self, frames: Sequence[Any], question: str) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(frames), ROWS):
            scores += self._batch(frames[start : start + ROWS], question)
        return scores

    def _batch(self, frames: Sequence[Any], question: str) -> list[float]:
        media = [[frame] for frame in frames]
        inputs = to_model(build_inputs(self.processor, media, [question] * len(media)), self.model)
        rows = self._embeddings(inputs).float()
        modalities = self.adapter.modalities(inputs)
        assert modalities is not None  # each row has a frame
        visual = modalities > 0
        text = inputs["attention_mask"].bool() & ~visual
        rows = torch.nn.functional.normalize(rows, dim=-1)
        mean = (rows * text[..., None]).sum(1, keepdim=True)
        alike = torch.nn.functional.cosine_similarity(rows, mean, dim=-1)
        best: list[float] = alike.masked_fill(~visual, -1.0).amax(1).tolist()
        return best

    @torch.inference_mode()
    def _embeddings(self, inputs: dict[str, Any]) -> Tensor:
        """Input of the decoder, (rows, columns, width), before any patch sees it."""

        def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            raise _Embedded(kwargs["inputs_embeds"])

        decoder = self.adapter.decoder
        with decoder.register_forward_pre_hook(keep, prepend=True, with_kwargs=True):
            try:
                self.model(**inputs, use_cache=False)
            except _Embedded as reached:
                return reached.rows
        raise AssertionError("the model ran without its decoder")


class _Embedded(Exception):  # it is no error: the decoder need not run
    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
