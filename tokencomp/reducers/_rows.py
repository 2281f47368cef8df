"""Steps that reducers share: rows of a span, keep counts of its parts, and checked values.

A reducer of one span takes its rows from `patch_rows`; one of batches takes `Patches`, whose `kept`
and `replaced` put the special tokens back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokencomp.errors import ScoreError
from tokencomp.tokens.patches import Patches
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.signals import TOWER_ATTENTION, TowerSignal
from tokencomp.tokens.spans import VisualTokens


def patch_rows(tokens: VisualTokens, keep: int) -> tuple[Tensor, int]:
    """Rows that are patches, int64, ascending; and how many of them stay if `keep` tokens do."""
    rows = (~tokens.special).nonzero()[:, 0]
    return rows, keep - (len(tokens) - rows.numel())


def top_k(scores: Tensor, special: Tensor, keep: int) -> Tensor:
    """Rows of the `keep` best-scored tokens, all special ones among them, ascending.

    Scores and `special` are (n,). Compared in float32; of equal scores the lower row wins.
    """
    from tokencomp.kernels import topk_stable

    scores = scores.float()
    if torch.isnan(scores).any():
        raise ScoreError(
            f"{int(torch.isnan(scores).sum())} of {scores.numel()} scores are NaN. The hidden "
            "states or attention logits overflowed; run the model in bfloat16 or float32."
        )
    kept: Tensor = topk_stable(scores.masked_fill(special, torch.inf), keep)
    return kept


def best_rows(scores: Tensor, counts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Rows of the `counts` largest of the scores (n,) of every span, ascending; ties go lower."""
    from tokencomp.kernels import topk_stable

    rows: Tensor = topk_stable(scores, counts, spans=lengths)
    return rows


def finite_values(values: Tensor, what: str) -> Tensor:
    """Return `values`, which messages call `what`, in float32, or raise `ScoreError`."""
    values = values.float()
    if math.isfinite(values.detach().sum().item()):  # no sum with NaN or an infinity is finite
        return values
    bad = ~torch.isfinite(values)
    if bad.any():
        raise ScoreError(
            f"{int(bad.sum())} of {values.numel()} {what} are NaN or infinite. The features or "
            "attention logits overflowed; run the model in bfloat16 or float32."
        )
    return values


def feature_norms(x: Tensor) -> Tensor:
    """Lengths of the features x (n, d), shape (n,), finite where the features are.

    They are taken in float32, because squares of finite float16 features overflow.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=wide)
    return norms


def finite_features(x: Tensor, scores: Tensor | None = None) -> Tensor:
    """Return the features x (n, d) as they are, once they and `scores` (m,) are known to be finite.

    The device is read once for both. Else it is a `ScoreError`.
    """
    norms = feature_norms(x)
    if scores is None:
        finite_values(norms, "feature norms")
    elif not math.isfinite((norms.detach().sum() + scores.detach().sum()).item()):
        finite_values(norms, "feature norms")
        finite_values(scores, "scores")
    return x


def supplied_scores(patches: Patches, reducer: str) -> Tensor:
    """The scores that the engine supplies for `Reducer.needs`, float32 (patches,), unchecked."""
    scores = patches.batch.scores
    if scores is None:
        raise ScoreError(
            f"reducer {reducer!r} needs attention scores and got none. Run it through "
            "tokencomp.patch, or set VisualTokens.scores."
        )
    return patches.of_patches(scores.float())


def tower_signal(patches: Patches, signal: TowerSignal, reducer: str) -> Tensor:
    """What the engine supplies for `signal`, (patches,) or (patches, heads, head_dim)."""
    if signal not in patches.batch.tower:
        raise ScoreError(
            f"reducer {reducer!r} needs {signal.part} of the vision tower and got none. Run it "
            "through tokencomp.patch, or set VisualTokens.tower."
        )
    return patches.of_patches(patches.batch.tower[signal])


def salient(patches: Patches, reducer: str) -> tuple[Tensor, Tensor]:
    """Features (patches, d) and `TOWER_ATTENTION` (patches,) in float32, both finite."""
    attention = tower_signal(patches, TOWER_ATTENTION, reducer)
    return finite_features(patches.features, attention).float(), attention


def with_merged(
    patches: Patches, x: Tensor, chosen: Tensor, merged: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Reduction:
    """The reduction that keeps rows of x (patches, d) as they are, and merged ones beside them.

    `merged` holds arguments of `Patches.replaced`.
    """
    parts = [(chosen, x[chosen], x.new_ones(len(chosen))), *merged]
    return patches.replaced(*(torch.cat(column) for column in zip(*parts, strict=True)))
