"""Temporal segments of videos, for methods that merge tokens over time."""

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
    """Cosine between the mean tokens of successive frames, shape (t - 1,), for every span."""
    unit = normalize(means(x, tokens.frame_lengths()), dim=1)
    cosines = _on_host((unit[:-1] * unit[1:]).sum(1))
    ends = starts_of([t for t, *_ in tokens.grids])
    return [cosines[start : end - 1] for start, end in itertools.pairwise(ends)]


def place_cosines(tokens: Tokens, x: Tensor) -> list[Floats]:
    """Cosine of every patch with the same place in the next frame, (t - 1, h·w), for every span."""
    sizes = np.repeat(tokens.frame_lengths(), tokens.frame_lengths())
    before = tokens.table(np.maximum(np.arange(len(x)) - sizes, 0))
    cosines = _on_host(cosine_similarity(x, x.index_select(0, before), dim=1))
    spans = zip(np.split(cosines, tokens.starts[1:]), tokens.grids, strict=True)
    return [values.reshape(t, h * w)[1:] for values, (t, h, w) in spans]


def _on_host(values: Tensor) -> Floats:
    """Values as an array; `detach` is an operation, saved where there is no gradient."""
    array: Floats = (values.detach() if values.requires_grad else values).cpu().numpy()
    return array


def segments(cosines: Floats, threshold: float, least: int) -> list[int]:
    """Lengths of runs of similar frames (FastVID, arXiv 2503.11187; FlashVID, arXiv 2602.08024).

    The video is cut between all successive frames with a cosine (t - 1,) below `threshold`, and
    between as many others, of lowest cosine, as it takes for `least` segments. Ties: the lower
    frame.
    """
    frames = len(cosines) + 1
    cuts = max(int((cosines < threshold).sum()), min(least, frames) - 1)
    ends = np.sort(np.argsort(cosines, kind="stable")[:cuts]) + 1
    return [int(stop - start) for start, stop in itertools.pairwise([0, *ends, frames])]


def static_segments(static: np.ndarray) -> list[int]:
    """Lengths of the segments that save most rows if static places are merged over each (HoliTom).

        maximise  Σ over segments of (ℓ - 1) · |{p : static in all ℓ - 1 pairs of frames}|

    by dynamic programming (arXiv 2505.21334). `static` (t - 1, n): whether a place is similar in a
    frame and the next one. Of equally good last segments the shortest is taken.
    """
    frames = len(static) + 1
    # best[end]: rows saved by the best segmentation of frames 0 … end - 1, whose last segment
    # begins at start[end].
    best, start = [0] * (frames + 1), [0] * (frames + 1)
    for end in range(1, frames + 1):
        best[end], start[end] = best[end - 1], end - 1
        common = np.ones(static.shape[1], dtype=bool)
        for first in range(end - 2, -1, -1):
            common = common & static[first]
            places = int(common.sum())
            if not places:
                break
            saved = best[first] + (end - 1 - first) * places
            if saved > best[end]:
                best[end], start[end] = saved, first
    ends = [frames]
    while ends[-1]:
        ends.append(start[ends[-1]])
    return [stop - start for start, stop in itertools.pairwise(ends[::-1])]


class Window(NamedTuple):
    """Patches of a run of frames, as rows of their span.

    `static` (places, frames) are places that are alike in all frames, `moving` (frames, places) the
    others.
    """

    static: HostIndex
    moving: HostIndex


def static_windows(cosines: Floats, keep: int, threshold: float) -> list[Window]:
    """The windows of `static_segments`, such that at least `keep` rows remain after merging.

    If merging all static places would leave fewer rows than `keep`, only those of largest cosine
    (the smallest one over the window) are static (ours). `cosines` is from `place_cosines`.
    """
    frames, n = len(cosines) + 1, cosines.shape[1]
    lengths = static_segments(cosines > threshold)
    ends = starts_of(lengths)
    # The smallest cosine of every place in every window.
    least = np.full((len(lengths), n), -1.0, dtype=cosines.dtype)
    for number, (first, end) in enumerate(itertools.pairwise(ends)):
        if end - first > 1:
            least[number] = cosines[first : end - 1].min(0)
    # Places become static by falling cosine, as long as at least `keep` rows remain.
    saved = np.where(least > threshold, np.asarray(lengths)[:, None] - 1, 0)
    order = np.argsort(-least, axis=None, kind="stable")
    fits = np.empty(order.shape, dtype=bool)
    fits[order] = saved.flatten()[order].cumsum() <= frames * n - keep
    static = fits.reshape(saved.shape) & (saved > 0)
    patches = np.arange(frames * n).reshape(frames, n)
    windows = zip(np.split(patches, ends[1:-1]), static, strict=True)
    return [Window(rows[:, mask].T, rows[:, ~mask]) for rows, mask in windows]


def run_means(tokens: Tokens, x: Tensor, groups: Sequence[HostIndex]) -> Tensor:
    """Means of x over the frames of every place; a group holds patches (places, frames)."""
    rows = tokens.table(np.concatenate([group.flatten() for group in groups]))
    return means(x.index_select(0, rows), [group.shape[1] for group in groups for _ in group])
