"""Raters: the text tokens whose attention counts in SparseVLM (arXiv 2410.04417)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencomp.engine.rows.layout import RowLayout


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
