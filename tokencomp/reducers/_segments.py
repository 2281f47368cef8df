"""Segments of like frames, as methods that merge along time cut videos."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tokencomp.reducers._batch import means
from tokencomp.tokens.stacks import HostIndex, starts_of
from tokencomp.tokens.tokens import Tokens

Floats = np.ndarray[Any, np.dtype[np.float32]]


def frame_cosines(tokens: Tokens, x: Tensor) -> list[Floats]:
    """Cosine of the mean of every frame with that of the next one, (t - 1,), for every span."""
    unit = normalize(means(x, tokens.frame_lengths()), dim=1)
    like = _on_host((unit[:-1] * unit[1:]).sum(1))
    ends = starts_of([t for t, *_ in tokens.grids])
    return [like[start : end - 1] for start, end in itertools.pairwise(ends)]


def place_cosines(tokens: Tokens, x: Tensor) -> list[Floats]:
    """Cosine of every patch with its place in the next frame, (t - 1, n), for every span."""
    sizes = np.repeat(tokens.frame_lengths(), tokens.frame_lengths())
    before = tokens.table(np.maximum(np.arange(len(x)) - sizes, 0))
    like = _on_host(cosine_similarity(x, x.index_select(0, before), dim=1))
    own = np.split(like, tokens.starts[1:])
    grids = tokens.grids
    return [v.reshape(t, h * w)[1:] for v, (t, h, w) in zip(own, grids, strict=True)]


def _on_host(values: Tensor) -> Floats:
    """Values as an array. `detach` is an operation, which calls without gradients do not need."""
    array: Floats = (values.detach() if values.requires_grad else values).cpu().numpy()
    return array


def segments(like: Floats, threshold: float, least: int) -> list[int]:
    """Lengths of runs of like frames, cut where neighbours are least alike.

    Every pair of neighbours with a cosine `like` (t - 1,) below `threshold` is cut, and at least as
    many others, of the lowest cosine, as make `least` segments (FastVID, arXiv 2503.11187;
    FlashVID, arXiv 2602.08024). Ties go to the lower frame.
    """
    frames = len(like) + 1
    cuts = max(int((like < threshold).sum()), min(least, frames) - 1)
    ends = np.sort(np.argsort(like, kind="stable")[:cuts]) + 1
    return [int(stop - start) for start, stop in itertools.pairwise([0, *ends, frames])]


def static_segments(static: np.ndarray) -> list[int]:
    """Lengths of the segments that save the most rows if static places stay once in each.

    A place is `static` (t - 1, n) where it looks alike in a frame and the next one. A segment of ℓ
    frames saves ℓ - 1 rows for every place that is static between all of its frames. Dynamic
    programme over all segmentations (HoliTom, arXiv 2505.21334); of equally good last segments the
    shortest counts.
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


class StillWindow(NamedTuple):
    """Numbers of the patches of a run of frames, in their span.

    `static` (places, frames) are the places that are alike in all frames, `moving` (frames, places)
    the others.
    """

    static: HostIndex
    moving: HostIndex


def still_windows(like: Floats, keep: int, threshold: float) -> list[StillWindow]:
    """The windows of `static_segments` of a video, with at least `keep` rows to choose from.

    Where a mean per static place would leave fewer rows than `keep`, only the places whose least
    similar neighbours are most alike are static (ours). `like` is one of `place_cosines`.
    """
    frames, n = len(like) + 1, like.shape[1]
    lengths = static_segments(like > threshold)
    ends = starts_of(lengths)
    least = np.full((len(lengths), n), -1.0, dtype=like.dtype)
    for number, (first, end) in enumerate(itertools.pairwise(ends)):
        if end - first > 1:
            least[number] = like[first : end - 1].min(0)
    saved = np.where(least > threshold, np.asarray(lengths)[:, None] - 1, 0)
    order = np.argsort(-least, axis=None, kind="stable")
    fits = np.empty(order.shape, dtype=bool)
    fits[order] = saved.flatten()[order].cumsum() <= frames * n - keep
    static = fits.reshape(saved.shape) & (saved > 0)
    patches = np.arange(frames * n).reshape(frames, n)
    windows = zip(np.split(patches, ends[1:-1]), static, strict=True)
    return [StillWindow(own[:, still].T, own[:, ~still]) for own, still in windows]


def run_means(tokens: Tokens, x: Tensor, groups: Sequence[HostIndex]) -> Tensor:
    """Means of x over the frames of places: groups are patches (places, frames), one by one."""
    rows = tokens.table(np.concatenate([group.flatten() for group in groups]))
    return means(x.index_select(0, rows), [group.shape[1] for group in groups for _ in group])
