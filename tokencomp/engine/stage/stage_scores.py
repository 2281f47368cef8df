"""Attention scores of a decoder call, from the layer that computes them to the stage they are for.

Both kinds of scores, of a call that has run and of the input of a layer, are computed in
`tokencomp.engine.scores.probes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokencomp.engine.rows.layout import RowLayout, kept_values, text_values, visual_values
from tokencomp.engine.scores.probes import input_scores, layer_scores
from tokencomp.tokens.signals import Attention


class StageScores:
    """Scores for the stages of one call that have not run yet, by the layer behind the stage.

    Parameters
    ----------
    layers
        All decoder layers.

    Attributes
    ----------
    projected
        By stage, what the attention call that scores for it has made of its input by `q_proj`.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._spans: dict[int, Tensor] = {}
        self._texts: dict[int, list[list[Tensor]]] = {}
        self.projected: dict[int, Tensor] = {}

    def known(self, stage: int) -> bool:
        """Whether there are scores for the stage before layer `stage`."""
        return stage in self._spans

    def of_call(
        self,
        stage: int,
        attn: nn.Module,
        kwargs: Mapping[str, Any],
        signal: Attention,
        layout: RowLayout,
    ) -> None:
        """Scores for a stage from an attention call that has just run, see `layer_scores`."""
        scores = layer_scores(attn, kwargs, signal, layout, self.projected.pop(stage, None))
        self._take(stage, signal, scores, layout)

    def of_input(
        self,
        stage: int,
        x: Tensor,
        tables: Any,
        positions: Tensor | None,
        signal: Attention,
        layout: RowLayout,
        cache: Any,
    ) -> None:
        """Scores for a stage from the queries and keys that the layer behind it makes of x.

        Parameters
        ----------
        x : Tensor, shape (B, n, d)
            Hidden states before the stage.
        tables, positions
            The `position_embeddings` and `position_ids` of the layer.
        """
        arguments = {"position_embeddings": tables, "position_ids": positions}
        layer = self._layers[stage]
        scores = input_scores(layer, x, arguments, signal, layout, cache, stage)
        self._take(stage, signal, scores, layout)

    def _take(self, stage: int, signal: Attention, scores: Tensor, layout: RowLayout) -> None:
        """Note scores; those of all columns, (B, n), in two parts."""
        if signal.rows == "none":
            self._texts[stage] = text_values(scores, layout)
            scores = visual_values(scores, layout)
        self._spans[stage] = scores

    def pop(
        self, stage: int, device: torch.device
    ) -> tuple[Tensor | None, list[list[Tensor]] | None]:
        """Scores of visual tokens and of text for a stage that runs now, see `StageInput`."""
        scores = self._spans.pop(stage, None)
        return None if scores is None else scores.to(device), self._texts.pop(stage, None)

    def follow(
        self, before: RowLayout, after: RowLayout, index: Tensor, device: torch.device
    ) -> None:
        """Leave out scores of tokens that have left, where no layer scores anew for a stage."""
        for stage, scores in self._spans.items():
            self._spans[stage] = kept_values(scores.to(device), before, after, index)


@torch.no_grad()
def rater_weights(x: Tensor, layout: RowLayout) -> Tensor:
    """Weights of the raters of every prompt among the columns of the embeddings x (B, n, d).

    Text after the last span is rated by softmax(x_i · q_m) over the text tokens m, mean over the
    visual tokens i, of the embeddings as they are. Raters are the tokens with at least the mean
    rating, each with the same weight; the weights of a prompt sum to 1.

    Returns
    -------
    Tensor of float32, shape (B, n)
        0 for all other columns.
    """
    weights = x.new_zeros(x.shape[:2], dtype=torch.float32)
    for b, prompts in enumerate(layout.prompts):
        for prompt in prompts:
            spans, text = layout.spans_of(b, prompt), layout.question_text(b, prompt)
            if not spans or text.start == text.stop:
                continue
            visual = torch.cat([x[b, live.start : live.stop] for live in spans]).float()
            rating = (visual @ x[b, text].float().T).softmax(1).mean(0)
            chosen = (rating >= rating.mean() * (1 - 1e-6)).float()
            weights[b, text] = chosen / chosen.sum()
    return weights
