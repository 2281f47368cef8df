"""Steps that reducers share: checked values, signals, the best rows, and sums over spans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokencomp.errors import ScoreError
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import TOWER_ATTENTION, TowerSignal
from tokencomp.tokens.tokens import Tokens

BLOCK = 16  # rows that are summed one after the other


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


def supplied_scores(tokens: Tokens, reducer: str) -> Tensor:
    """The scores that the engine supplies for `Reducer.needs`, float32 (n,), unchecked."""
    if tokens.scores is None:
        raise ScoreError(
            f"reducer {reducer!r} needs attention scores and got none. Run it through "
            "tokencomp.patch, or set Tokens.scores."
        )
    return tokens.scores.float()


def tower_signal(tokens: Tokens, signal: TowerSignal, reducer: str) -> Tensor:
    """What the engine supplies for `signal`, (n,) or (n, heads, head_dim)."""
    if signal not in tokens.tower:
        raise ScoreError(
            f"reducer {reducer!r} needs {signal.part} of the vision tower and got none. Run it "
            "through tokencomp.patch, or set Tokens.tower."
        )
    return tokens.tower[signal]


def salient(tokens: Tokens, reducer: str) -> tuple[Tensor, Tensor]:
    """Features (n, d) and `TOWER_ATTENTION` (n,) in float32, both finite."""
    attention = tower_signal(tokens, TOWER_ATTENTION, reducer)
    return finite_features(tokens.features, attention).float(), attention


def with_merged(x: Tensor, chosen: Tensor, merged: tuple[Tensor, Tensor, Tensor] | None) -> Kept:
    """Keeps rows `chosen` of x (n, d) as they are, and merged rows beside them.

    `merged` are rows, features and weights; None: there are none.
    """
    kept = chosen, x[chosen], x.new_ones(len(chosen))
    if merged is None:
        return Kept.ascending(*kept)
    return Kept.ascending(*(torch.cat(column) for column in zip(kept, merged, strict=True)))


def segment(values: Tensor, lengths: Sequence[int], how: str) -> Tensor:
    """Sum, max or min ("sum", "max", "min") of every span of values (n, …); no span is empty."""
    if len(lengths) == 1:
        single: dict[str, Callable[..., Tensor]] = {
            "sum": torch.sum,
            "max": torch.amax,
            "min": torch.amin,
        }
        return single[how](values, dim=0, keepdim=True)
    counts = torch.tensor(list(lengths), device=values.device)
    return torch.segment_reduce(values, how, lengths=counts, unsafe=True)


def spread(values: Tensor, lengths: Sequence[int], owners: Tensor | None = None) -> Tensor:
    """One value per span as one per patch; a single value is left to broadcast.

    `owners` is the span of every patch, for callers that have it already.
    """
    if len(lengths) == 1:
        return values
    if owners is None:
        rows = np.repeat(np.arange(len(lengths)), lengths)
        owners = torch.from_numpy(rows).to(values.device)
    return values.index_select(0, owners)


def means(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean of every run of values (n, d) of these lengths, none empty.

    Runs are summed in blocks of 16 rows, and the blocks again, as `Tensor.mean` does on a CPU if d
    is a multiple of 32. All runs of up to 16 rows take one launch, those of up to 256 rows two, and
    no rounding depends on other runs.
    """
    counts, rows = torch.tensor(lengths, device=values.device), list(lengths)
    while max(rows) > 1:
        blocks = [min(BLOCK, n - first) for n in rows for first in range(0, n, BLOCK)]
        sizes = torch.tensor(blocks, device=values.device)
        values = torch.segment_reduce(values, "sum", lengths=sizes, unsafe=True)
        rows = [-(-n // BLOCK) for n in rows]
    return values / counts[:, None]


def ranked(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows of values (n,), span by span, each by falling value; ties go to the lower row."""
    order = values.sort(descending=True, stable=True).indices
    if len(lengths) == 1:
        return order
    owners = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(values.device)
    return order[owners[order].sort(stable=True).indices]


def min_max(
    values: Tensor, lengths: Sequence[int], least: float = 0.0, owners: Tensor | None = None
) -> Tensor:
    """(v - min + least) / (max - min + 1e-6) of every run of values (n,), none of them empty."""
    low, high = (segment(values, lengths, how) for how in ("min", "max"))
    width = high - low + 1e-6
    low, width = (spread(value, lengths, owners) for value in (low, width))
    return (values - low + least) / width


def questions(tokens: Tokens, reducer: str, instead: str) -> tuple[Tensor, list[int], list[int]]:
    """Embeddings of the texts after the spans; spans of a prompt share one.

    They are unit embeddings of all texts, one text after the other, float32 (Σ m, d); m, the length
    of every text; which text each span has. `instead` is the option that does without.
    """
    queries = tokens.queries
    if queries is None or not all(map(len, queries)):
        raise ScoreError(
            f"{reducer} compares visual tokens with the text after them, and there is none. Put "
            f"the question after the image, or use {instead}."
        )
    texts, prompt = distinct(queries)
    return normalize(torch.cat(texts).float(), dim=1), [len(text) for text in texts], prompt


def distinct(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The tensors, once each, and which of them every one is: spans of a prompt share theirs."""
    by_id = {id(tensor): tensor for tensor in tensors}
    numbers = {key: number for number, key in enumerate(by_id)}
    return list(by_id.values()), [numbers[id(tensor)] for tensor in tensors]
