"""Input baselines: media shrunk to the ratio, or the token budget of a model's processor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from tokencomp.errors import MediaError, OptionError
from tokencomp.inputs.pixels import SOFT_TOKENS
from tokencomp.inputs.prompts import build_inputs
from tokencomp.inputs.questions import modality_of
from tokencomp.inputs.video import with_frames
from tokencomp.inputs.video.frames import frame_indices
from tokencomp.plan.plan import keep_count

STRETCH = (1.0, 1.1, 1 / 1.1, 1.22, 1 / 1.22)
STEPS, LADDER = 10, 40
"""Halvings of the search for a scale, and scales tried for the smallest that is accepted."""
# The setting of an image processor that limits the tokens of one image, and the values that it
# may have; None is any number. Sources: Gemma 4's and LFM2-VL's processors in transformers.
BUDGETS: dict[str, tuple[int, ...] | None] = {
    "max_soft_tokens": SOFT_TOKENS,
    "max_image_tokens": None,
}


class EqualTokens:
    """Shrinks media until the processor produces about `1 - ratio` of their tokens.

    The processor rounds to patches, tiles and frame pairs, so its own counts (of the ids
    `placeholders`) decide; they are cached by media size. Among the sizes nearest to the target,
    the one with fewer tokens is chosen, then the largest image. If the smallest count exceeds the
    target, the largest image of that count is used; if all counts are equal, the media are
    unchanged, and the ratio reached shows that no baseline exists.

    `prefer`: "downscale" reduces pixels, and frames only if the size of a frame does not change the
    count; "fewer_frames" reduces the frames of videos, and the pixels of images.
    """

    def __init__(self, processor: Any, placeholders: Sequence[int], prefer: str) -> None:
        self.processor, self.placeholders, self.prefer = processor, list(placeholders), prefer
        self._tokens: dict[tuple[Any, int], int] = {}
        self._shrinkers: dict[tuple[Any, ...], Callable[[Any], Any]] = {}

    def tokens(self, media: Any) -> int:
        """Visual tokens that the processor produces for one image or video."""
        key = (media[0].size, len(media)) if isinstance(media, list) else (media.size, 0)
        if key not in self._tokens:
            ids = build_inputs(self.processor, [[media]], ["?"])["input_ids"]
            self._tokens[key] = int(np.isin(ids.numpy(), self.placeholders).sum())
        return self._tokens[key]

    def _takes(self, media: Any) -> bool:
        """Whether the processor accepts it: Qwen-VL's refuses aspect ratios above 200."""
        try:
            return self.tokens(media) > 0
        except MediaError:
            return False

    def shrink(self, media: Any, ratio: float) -> Any:
        """The media with `1 - ratio` of their tokens, as nearly as possible. Sounds are sped up."""
        if modality_of(media) == "audio":
            return faster(media, 1 - ratio)
        is_video = modality_of(media) == "video"
        size = (media[0] if is_video else media).size
        key = (is_video, size, len(media) if is_video else 1, ratio)
        if key not in self._shrinkers:
            self._shrinkers[key] = self._search(media, is_video, size, ratio)
        return self._shrinkers[key](media)

    def _search(
        self, media: Any, is_video: bool, size: tuple[int, int], ratio: float
    ) -> Callable[[Any], Any]:
        target = keep_count(self.tokens(media), 1.0 - ratio)
        frames = [partial(_fewer, n) for n in range(1, len(media) + 1)] if is_video else []
        frames = [few for few in frames if self._takes(few(media))]
        if is_video and self.prefer == "fewer_frames":
            return self._nearest(media, frames, target)[-1]
        smaller = self._smaller(media, size, target)
        if smaller is None:
            # If all images get equally many tokens, smaller ones save none.
            return self._nearest(media, frames, target)[-1] if is_video else lambda same: same
        return smaller

    def _smaller(self, media: Any, size: tuple[int, int], target: int) -> Resize | None:
        """The size whose token count is nearest to the target, and among these the largest."""
        full, many = self.tokens(media), len(media) if isinstance(media, list) else 1
        # With fewer pixels than tokens, the processor would only enlarge the picture again.
        least = min(1.0, (full / (size[0] * size[1] * many)) ** 0.5)
        # Rounding narrows thin pictures, until the processor refuses them; it takes the whole one.
        steps = (least ** (1 - k / LADDER) for k in range(LADDER + 1))
        least = next(s for s in steps if self._takes(Resize(size, s)(media)))
        fewest = self.tokens(Resize(size, least)(media))
        crossing = self._largest(media, Resize(size, least), max(target, fewest)).scale
        tried = [Resize(size, s, a) for s in (least, crossing, crossing * 1.06) for a in STRETCH]
        tried = [c for c in tried if self._takes(c(media))]
        best = self._nearest(media, tried, target)
        tokens = self.tokens(best[0](media))
        if tokens >= full:
            return None
        by_stretch = {c.stretch: c for c in best}  # of equal stretch, the largest
        return max(
            (self._largest(media, c, tokens) for c in by_stretch.values()), key=lambda c: c.scale
        )

    def _nearest(self, media: Any, candidates: Sequence[Any], target: int) -> list[Any]:
        """The candidates whose count is nearest to the target; of two equally near, the lower."""

        def distance(candidate: Any) -> tuple[int, int]:
            n = self.tokens(candidate(media))
            return abs(n - target), n

        best = min(map(distance, candidates))
        return [c for c in candidates if distance(c) == best]

    def _largest(self, media: Any, small: Resize, limit: int) -> Resize:
        """`small` at the largest accepted scale with at most `limit` tokens, by bisection."""
        found, low, high = small.scale, small.scale, 1.0
        for _ in range(STEPS):
            middle = (low * high) ** 0.5
            taken = self._takes(smaller := small.at(middle)(media))
            if taken and self.tokens(smaller) > limit:
                high = middle
            else:
                low, found = middle, middle if taken else found
        return small.at(found)


class Resize:
    """A scale of the sides, and a factor of the aspect ratio."""

    def __init__(self, original: tuple[int, int], scale: float, stretch: float = 1.0) -> None:
        self.original, self.scale, self.stretch = original, scale, stretch
        width, height = original[0] * scale * stretch, original[1] * scale / stretch
        self.size = (max(round(width), 1), max(round(height), 1))

    def at(self, scale: float) -> Resize:
        return Resize(self.original, scale, self.stretch)

    def __call__(self, media: Any) -> Any:
        if isinstance(media, list):
            return with_frames(media, map(self, media))
        return media.resize(self.size, Image.Resampling.BICUBIC)


def _fewer(frames: int, media: Any) -> Any:
    """A video with this many frames, evenly spaced."""
    places = frame_indices(len(media), frames)
    return with_frames(media, [media[k] for k in places], places)


def faster(samples: np.ndarray, share: float) -> np.ndarray:
    """Sound (n,) in `share` of its time, at higher pitch: its spectrum is truncated."""
    n, kept = len(samples), max(1, round(len(samples) * share))
    spectrum = np.fft.rfft(samples)[: kept // 2 + 1]
    return (np.fft.irfft(spectrum, kept) * (kept / n)).astype(samples.dtype)


def has_budget(processor: Any) -> str | None:
    """The name of the processor's budget of tokens per image among `BUDGETS`, if it has one."""
    images = getattr(processor, "image_processor", None)
    return next((name for name in BUDGETS if isinstance(getattr(images, name, None), int)), None)


@contextlib.contextmanager
def native_budget(processor: Any, ratio: float) -> Iterator[int]:
    """Set the processor's budget of tokens to about `1 - ratio` of it in the block; yield it."""
    name = has_budget(processor)
    if name is None:
        raise OptionError(
            "this model's processor has no budget of visual tokens; use 'downscale' "
            f"as the baseline. Known are {', '.join(BUDGETS)}."
        )
    images, allowed = processor.image_processor, BUDGETS[name]
    usual = getattr(images, name)
    target = (1 - ratio) * usual
    budget = max(1, round(target))
    if allowed is not None:
        budget = min(allowed, key=lambda n: (abs(n - target), n))
    setattr(images, name, budget)
    if hasattr(images, "min_image_tokens"):
        least = images.min_image_tokens
        images.min_image_tokens = min(least, budget)
    try:
        yield budget
    finally:
        setattr(images, name, usual)
        if hasattr(images, "min_image_tokens"):
            images.min_image_tokens = least
