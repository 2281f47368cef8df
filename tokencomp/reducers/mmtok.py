"""Comparator: covering of the question and of the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.plan.reducer import Traits
from tokencomp.reducers._batch import finite_features, questions
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import QUERY, Signal
from tokencomp.tokens.stacks import HostIndex, Stack, by_stack, masked, rows_of, starts_of
from tokencomp.tokens.tokens import Tokens

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
    and standard phrases on LLaVA. The temperature of 0.02 is the release's for LLaVA; for Qwen it
    takes 0.01 (1 of 40 sets of random features differs). Visual tokens are compared after the
    projector; the release compares them with the question there, and with each other before it.
    With both after the projector the rule gave the release's sets in 60 of 60 random cases.
    """

    cover: Literal["both", "picture"] = "both"

    traits = Traits(batched=True)
    summary = "covers question and picture (MMTok 2508.18264)"

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({QUERY} if self.cover == "both" else ())

    def reduce(self, tokens: Tokens) -> Kept:
        from tokencomp.kernels import facility_select

        unit = normalize(finite_features(tokens.features).float(), dim=1)
        points, reach = unit / VISION, np.asarray(tokens.lengths)
        shift = np.repeat(np.log(reach / SHARE), reach)
        if self.cover == "both":
            texts, lengths, prompt = questions(tokens, "mmtok", "cover='picture'")
            own = np.asarray(lengths)[prompt]
            rows = tokens.table(rows_of(starts_of(lengths), prompt))
            # The points of a span are its patches, and then its text.
            spans = np.repeat([*range(len(own))] * 2, [*reach, *own])
            order = np.argsort(spans, kind="stable")
            points = torch.cat([points, texts.to(unit)[rows] / TEXT])[tokens.table(order)]
            shift = np.concatenate([shift, np.repeat(np.log(own), own)])[order]
            reach = reach + own
        offset = log_sums(tokens, unit, points, reach) + unit.new_tensor(shift)
        how = {"points": points, "point_spans": reach.tolist(), "offset": offset}
        return Kept(facility_select(unit, tokens.budgets, spans=tokens.lengths, **how))


def log_sums(tokens: Tokens, unit: Tensor, points: Tensor, reach: HostIndex) -> Tensor:
    """log Σ_j exp(y_i · x_j) of every point y over the patches x of its span, (points,).

    Parameters
    ----------
    unit : Tensor, shape (n, d)
    points : Tensor, shape (points, d)
    reach
        Points of every span.
    """
    starts, lengths = np.asarray(tokens.starts), np.asarray(tokens.lengths)

    def of_stack(spans: HostIndex, _: Stack, points: Tensor) -> Tensor:
        own = Stack(starts[spans], lengths[spans], unit.device)
        rows, step = own.of(unit).mT, max(1, BLOCK // (len(spans) * own.longest))
        parts = (masked(part @ rows, own.lengths, -torch.inf) for part in points.split(step, 1))
        return torch.cat([part.logsumexp(2) for part in parts], 1)

    return by_stack(reach, of_stack, points)
