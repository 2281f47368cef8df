"""Small steps that several reducers share: patches apart from special tokens, and back."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tokencomp.errors import PlanError, ScoreError
from tokencomp.tokens import Reduction, VisualTokens

BLOCK = 1 << 24  # cosines at once


def split(tokens: VisualTokens) -> tuple[Tensor, Tensor]:
    """Rows of patches and rows of special tokens, int64, ascending."""
    return (~tokens.special).nonzero()[:, 0], tokens.special.nonzero()[:, 0]


def sizes_before(tokens: VisualTokens) -> Tensor:
    """How many original tokens every row stands for so far, fp32, shape (n,)."""
    if tokens.sizes is not None:
        return tokens.sizes
    return torch.ones(len(tokens), device=tokens.features.device)


def joined(tokens: VisualTokens, chosen: Tensor) -> Reduction:
    """The reduction that keeps all special tokens and the patches `chosen`.

    Parameters
    ----------
    chosen : Tensor of int64
        Rows of `tokens.features`, none of them special, in any order.
    """
    _, special = split(tokens)
    return Reduction(torch.cat([special, chosen]).sort().values)


def rewritten(tokens: VisualTokens, rows: Tensor, x: Tensor, sizes: Tensor) -> Reduction:
    """The reduction that keeps all special tokens and has new patches.

    Parameters
    ----------
    rows : Tensor of int64, shape (k,)
        Where the patches stand, in any order.
    x, sizes
        Their features (k, d), and how many original tokens each stands for (k,).
    """
    _, special = split(tokens)
    keep, by = torch.cat([special, rows]).sort()
    ones = torch.ones(special.numel(), device=sizes.device)
    merged = torch.cat([tokens.features[special], x])[by]
    return Reduction(keep, merged, torch.cat([ones, sizes])[by])


def merge_into(
    tokens: VisualTokens, rows: Tensor, chosen: Tensor, floor: float, centred: bool
) -> Reduction:
    """Merge every dropped patch into its nearest kept one, if their cosine is at least `floor`.

    Parameters
    ----------
    rows : Tensor of int64, shape (n,)
        Rows of the patches.
    chosen : Tensor of int64, shape (k,)
        Places in `rows` that stay, ascending.
    """
    from tokencomp.kernels import merge_rows

    x = tokens.features[rows]
    wide = x.float()
    unit = torch.nn.functional.normalize(wide - wide.mean(0) if centred else wide, dim=1)
    kept_unit, step = unit[chosen].T, max(1, BLOCK // chosen.numel())
    blocks = [(unit[at : at + step] @ kept_unit).max(1) for at in range(0, len(unit), step)]
    best, nearest = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    target = torch.where(best >= floor, chosen[nearest], -1)
    target[chosen] = chosen
    before = sizes_before(tokens)
    merged = merge_rows(x, target, chosen, before[rows])
    kept = joined(tokens, rows[chosen])
    features, sizes = tokens.features[kept.keep].clone(), before[kept.keep]
    patch = ~tokens.special[kept.keep]
    features[patch], sizes[patch] = merged.x, merged.sizes.float()
    return Reduction(kept.keep, features, sizes)


def whole_grid(tokens: VisualTokens, reducer: str) -> Tensor:
    """Rows of the patches, as long as the span is whole (t·h·w of them).

    Raises
    ------
    PlanError
        An earlier stage has already dropped tokens of the span.
    """
    rows, _ = split(tokens)
    t, h, w = tokens.grid
    if rows.numel() != t * h * w:
        raise PlanError(
            f"reducer {reducer!r} compares places of a whole {t}×{h}×{w} grid, but "
            f"{rows.numel()} of its tokens are left. Use it at decoder entry (layer 0)."
        )
    return rows


def frame_counts(tokens: VisualTokens) -> list[int]:
    """Patches left of every frame of the grid; read from the device only if some are missing."""
    t, h, w = tokens.grid
    if tokens.index is None:
        return [h * w] * t
    return torch.bincount(tokens.cells() // (h * w), minlength=t).tolist()


def share(total: int, counts: list[int]) -> list[int]:
    """`total` over groups in proportion to `counts`: whole numbers, exact in sum, spread evenly.

    None is above its count, as long as `total` is not above their sum. Where there is less than
    one per group, the last of every run of groups gets it.
    """
    all_of_them = max(sum(counts), 1)
    ends = [total * c // all_of_them for c in itertools.accumulate(counts, initial=0)]
    return [b - a for a, b in itertools.pairwise(ends)]


def whole(wanted: list[float], total: int, most: int) -> list[int]:
    """Round `wanted` to whole numbers in 0 … most that sum to `total`, by largest remainders."""
    quota = [min(most, int(v)) for v in wanted]
    order = sorted(range(len(quota)), key=lambda i: (int(wanted[i]) - wanted[i], i))
    while (missing := total - sum(quota)) > 0:
        open_ = [i for i in order if quota[i] < most]
        for i in open_[:missing]:
            quota[i] += 1
    return quota


def finite(values: Tensor, what: str) -> Tensor:
    """Return `values` in fp32, or raise `ScoreError` if one is NaN or infinite."""
    values = values.float()
    bad = ~torch.isfinite(values)
    if bad.any():
        raise ScoreError(
            f"{int(bad.sum())} of {values.numel()} {what} are NaN or infinite. The features or "
            "attention logits overflowed; run the model in bfloat16 or float32."
        )
    return values


def finite_rows(x: Tensor) -> None:
    """Raise `ScoreError` if a row of features x (n, d) is NaN or infinite.

    One read from the device. Norms are taken in fp32: squares of finite fp16 features overflow.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    finite(torch.linalg.vector_norm(x, dim=1, dtype=wide), "feature norms")


def given_keys(tokens: VisualTokens, reducer: str) -> Tensor:
    """The vision tower's keys that the hooks supply, fp32, shape (n, c).

    Raises
    ------
    ScoreError
        There are none.
    """
    if tokens.keys is None:
        raise ScoreError(
            f"reducer {reducer!r} needs keys of the vision tower and got none. Run it through "
            "tokencomp.patch, or set VisualTokens.keys."
        )
    return tokens.keys


def given_scores(tokens: VisualTokens, reducer: str) -> Tensor:
    """The scores that the hooks supply, fp32.

    Raises
    ------
    ScoreError
        There are none, or one is not finite.
    """
    if tokens.scores is None:
        raise ScoreError(
            f"reducer {reducer!r} needs attention scores and got none. Run it through "
            "tokencomp.patch, or set VisualTokens.scores."
        )
    return finite(tokens.scores, "scores")
