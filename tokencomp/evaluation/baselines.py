"""Equal-token baselines: give the processor less, so that the full model gets as few tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tokencomp.evaluation.answering import build_inputs
from tokencomp.evaluation.examples import media_kind
from tokencomp.media import frame_indices
from tokencomp.plan import count

STRETCH = (1.0, 1.1, 1 / 1.1, 1.22, 1 / 1.22)
STEPS = 12


class EqualTokens:
    """Shrinks media until the processor makes about `1 - ratio` of their tokens.

    Which size gives how many tokens is asked of the processor itself (it rounds to patches, tiles
    and frame pairs), once per media size. Ties go to fewer tokens.

    Parameters
    ----------
    processor
        A Hugging Face processor.
    placeholders
        Token ids that stand for visual tokens.
    prefer
        "downscale": smaller pixels, fewer frames only where the size of a frame does not change
        the count; "fewer_frames": fewer frames of a video, smaller pixels for images.
    """

    def __init__(self, processor: Any, placeholders: Sequence[int], prefer: str) -> None:
        self.processor, self.placeholders, self.prefer = processor, list(placeholders), prefer
        self._tokens: dict[tuple[Any, int], int] = {}
        self._found: dict[tuple[Any, ...], Callable[[Any], Any]] = {}

    def tokens(self, media: Any) -> int:
        """Visual tokens that the processor makes of one image or video."""
        key = (media[0].size, len(media)) if isinstance(media, list) else (media.size, 0)
        if key not in self._tokens:
            ids = build_inputs(self.processor, [[media]], ["?"])["input_ids"]
            self._tokens[key] = int(np.isin(ids.numpy(), self.placeholders).sum())
        return self._tokens[key]

    def shrink(self, media: Any, ratio: float) -> Any:
        """The image or video with `1 - ratio` of its tokens, as near as the processor allows."""
        is_video = media_kind(media) == "video"
        size = (media[0] if is_video else media).size
        key = (is_video, size, len(media) if is_video else 1, ratio)
        if key not in self._found:
            self._found[key] = self._search(media, is_video, size, ratio)
        return self._found[key](media)

    def _search(
        self, media: Any, is_video: bool, size: tuple[int, int], ratio: float
    ) -> Callable[[Any], Any]:
        target = count(self.tokens(media), 1.0 - ratio)
        frames = [_Frames(n) for n in range(1, len(media) + 1)] if is_video else []
        if is_video and self.prefer == "fewer_frames":
            return self._nearest(media, frames, target)
        best = self._nearest(media, self._sizes(media, size, target), target)
        if self.tokens(best(media)) < self.tokens(media):
            return best
        return self._nearest(media, frames, target) if is_video else _unchanged

    def _sizes(self, media: Any, size: tuple[int, int], target: int) -> list[_Resize]:
        """Sizes around the one whose token count crosses the target (bisection)."""
        low, high = 0.02, 1.0
        for _ in range(STEPS):
            middle = (low * high) ** 0.5
            if self.tokens(_Resize.scaled(size, middle)(media)) > target:
                high = middle
            else:
                low = middle
        scales = [s * step for s in (low, high) for step in (1.0, 1.06)]
        return [_Resize.scaled(size, min(s, 1.0), a) for s in scales for a in STRETCH]

    def _nearest(self, media: Any, candidates: Sequence[Any], target: int) -> Any:
        def distance(candidate: Any) -> tuple[int, int]:
            n = self.tokens(candidate(media))
            return abs(n - target), n

        return min(candidates, key=distance)


def _unchanged(media: Any) -> Any:
    """Where the processor gives every image as many tokens, blurring it would save none."""
    return media


class _Resize:
    def __init__(self, width: int, height: int) -> None:
        self.size = (max(width, 1), max(height, 1))

    @classmethod
    def scaled(cls, size: tuple[int, int], scale: float, stretch: float = 1.0) -> _Resize:
        return cls(round(size[0] * scale * stretch), round(size[1] * scale / stretch))

    def __call__(self, media: Any) -> Any:
        if isinstance(media, list):
            return [self(frame) for frame in media]
        return media.resize(self.size, Image.Resampling.BICUBIC)


class _Frames:
    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __call__(self, media: Any) -> Any:
        return [media[k] for k in frame_indices(len(media), self.frames)]
