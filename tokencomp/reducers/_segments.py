"""Segments of like frames, as methods that merge along time cut videos."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def segments(means: Tensor, threshold: float, least: int) -> list[int]:
    """Lengths of runs of like frames, cut where neighbours are least alike.

    Every pair of neighbours with a cosine below `threshold` is cut, and at least as many others, of
    the lowest cosine, as make `least` segments (FastVID, arXiv 2503.11187; FlashVID,
    arXiv 2602.08024). Ties go to the lower frame.

    Parameters
    ----------
    means : Tensor, shape (t, d)
        One row per frame.
    """
    from tokencomp.kernels import topk_stable

    frames = len(means)
    unit = normalize(means.float(), dim=1)
    like = (unit[:-1] * unit[1:]).sum(1)
    cuts = max(int((like < threshold).sum()), min(least, frames) - 1)
    ends = (topk_stable(-like, cuts) + 1).tolist()
    return [stop - start for start, stop in itertools.pairwise([0, *ends, frames])]


def static_segments(static: np.ndarray) -> list[int]:
    """Lengths of the segments that save the most rows if static places stay once in each.

    A segment of ℓ frames saves ℓ - 1 rows for every place that is static between all of its frames.
    Dynamic programme over all segmentations (HoliTom, arXiv 2505.21334); of equally good last
    segments the shortest counts.

    Parameters
    ----------
    static : array of bool, shape (t - 1, n)
        Whether a place looks alike in a frame and the next one.
    """
    frames = len(static) + 1
    best, start = [0] * (frames + 1), [0] * (frames + 1)
    for end in range(1, frames + 1):  # the last segment ends before this frame
        best[end], start[end] = best[end - 1], end - 1
        alike = np.ones(static.shape[1], dtype=bool)
        for first in range(end - 2, -1, -1):
            alike = alike & static[first]
            places = int(alike.sum())
            if not places:
                break
            saved = best[first] + (end - 1 - first) * places
            if saved > best[end]:
                best[end], start[end] = saved, first
    ends = [frames]
    while ends[-1]:
        ends.append(start[ends[-1]])
    return [stop - start for start, stop in itertools.pairwise(ends[::-1])]


@dataclass(frozen=True)
class StillWindow:
    """Frames `first … first + length - 1`, and the places that are alike in all of them.

    `static` is bool, shape (n,).
    """

    first: int
    length: int
    static: Tensor


def still_windows(x: Tensor, keep: int, threshold: float) -> list[StillWindow]:
    """The windows of `static_segments` of a video, with at least `keep` rows to choose from.

    Where a mean per static place would leave fewer rows than `keep`, only the places whose least
    similar neighbours are most alike are static (ours).

    Parameters
    ----------
    x : Tensor, shape (t, n, d)
    """
    frames, places, _ = x.shape
    like = cosine_similarity(x[1:].float(), x[:-1].float(), dim=2)
    lengths = static_segments((like > threshold).cpu().numpy())
    firsts = np.cumsum([0, *lengths[:-1]]).tolist()
    least = torch.stack(
        [
            like[first : first + length - 1].amin(0) if length > 1 else x.new_full((places,), -1.0)
            for first, length in zip(firsts, lengths, strict=True)
        ]
    ).float()
    saved = torch.tensor(lengths, device=x.device)[:, None].expand_as(least) - 1
    saved = saved.masked_fill(least <= threshold, 0)
    order = least.flatten().sort(descending=True, stable=True).indices
    fits = torch.empty_like(order, dtype=torch.bool)
    fits[order] = saved.flatten()[order].cumsum(0) <= frames * places - keep
    static = fits.view_as(saved) & (saved > 0)
    return [StillWindow(*window) for window in zip(firsts, lengths, static, strict=True)]
