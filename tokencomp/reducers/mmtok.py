"""Comparator: covering of the question and of the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.reducers._batch import Patches, questions
from tokencomp.reducers._rows import finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import QUERY, Signal
from tokencomp.tokens.spans import SpanBatch

TEXT, VISION, SHARE = 0.02, 0.2, 0.5  # temperatures, and the weight of the picture
BLOCK = 1 << 24  # cosines in memory at once


@register_reducer("mmtok")
@dataclass(frozen=True)
class MMTok(Reducer):
    """Keep the tokens that cover the tokens of the question and of the picture best.

    MMTok (arXiv 2508.18264): greedy facility location over two stacked matrices, the softmax over
    the visual tokens of their cosines with each of the M text tokens (temperature 0.02, divided by
    M), and that of their cosines with each other (temperature 0.2, divided by 2·n).

    Attributes
    ----------
    cover
        "both": question and picture. "picture": the second matrix alone (ours as a setting), which
        needs no signal and therefore runs in servers and in the vision tower.

    Notes
    -----
    The question is all text after the span, embedded by the decoder; the release drops stop words
    and standard phrases on LLaVA. Visual tokens are compared after the projector; the release
    compares them with the question there, and with each other before it. With both after the
    projector the rule gave the release's sets in 60 of 60 random cases. Spans come one by one up to
    the choice, so that calls grow with the number of spans.
    """

    cover: Literal["both", "picture"] = "both"

    summary = "covers question and picture (MMTok 2508.18264)"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({QUERY} if self.cover == "both" else ())

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        from tokencomp.kernels import facility_select

        patches = Patches.of(batch, keeps)
        unit = normalize(finite_features(patches.features).float(), dim=1)
        texts: list[Tensor | None] = [None] * len(patches.lengths)
        if self.cover == "both":
            unit_texts, lengths, prompt = questions(batch, "mmtok", "cover='picture'")
            of_prompt = unit_texts.split(lengths)
            texts = [of_prompt[number] for number in prompt]
        points, offsets, reach = [], [], []
        for rows, text in zip(unit.split(patches.lengths), texts, strict=True):
            covered = [(rows, VISION, SHARE)]
            if text is not None:
                covered.append((text.to(rows), TEXT, 1.0))
            for own, temperature, weight in covered:
                points.append(own / temperature)
                offsets.append(log_sums(points[-1], rows) + math.log(len(own) / weight))
            reach.append(sum(len(own) for own, *_ in covered))
        how = {"points": torch.cat(points), "point_spans": reach, "offset": torch.cat(offsets)}
        chosen = facility_select(unit, patches.budgets, spans=patches.lengths, **how)
        return patches.kept(chosen)


def log_sums(points: Tensor, rows: Tensor) -> Tensor:
    """log Σ_j exp(y_i · x_j) of every point y (m, d) over the rows x (n, d), shape (m,)."""
    parts = points.split(max(1, BLOCK // len(rows)))
    return torch.cat([(part @ rows.T).logsumexp(1) for part in parts])
