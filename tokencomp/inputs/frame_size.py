"""The size of a video's frames when a processor gets only some of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

Resize = Callable[..., tuple[int, int]]


class FrameSize:
    """How a processor is asked to give some frames the size that they have among all frames.

    Parameters
    ----------
    inner
        The video processor of transformers.
    size
        Its option `size` in a call, if the size of a frame depends on their number; else None.
    resize
        The function of its module that computes the size.
    """

    def __init__(self, inner: Any, size: dict[str, int] | None, resize: Resize | None) -> None:
        self.inner, self.size, self.resize = inner, size, resize

    @property
    def counts_frames(self) -> bool:
        """Whether the size of a frame depends on the number of frames."""
        return self.size is not None

    @classmethod
    def of(cls, inner: Any, options: dict[str, Any]) -> FrameSize | None:
        """What `inner` does under `options`; None if it must get all frames together.

        That is where it samples frames itself, where a share of the pixels of the video is the
        largest size of a frame, and where the class of the processor is not known.
        """
        import transformers

        capped = options.get("cap_pixels_per_frame", getattr(inner, "cap_pixels_per_frame", None))
        resized = options.get("do_resize", inner.do_resize)
        sampled = options.get("do_sample_frames", inner.do_sample_frames)
        if not resized or capped or sampled:
            return None
        if type(inner) is transformers.Qwen2VLVideoProcessor:
            return cls(inner, None, None)
        if type(inner) is transformers.Qwen3VLVideoProcessor:
            resize = getattr(sys.modules[type(inner).__module__], "smart_resize", None)
            size = dict(options.get("size") or inner.size)
            if resize is not None and {"shortest_edge", "longest_edge"} <= size.keys():
                return cls(inner, size, resize)
        return None

    def patches(self, shape: tuple[int, ...], options: dict[str, Any]) -> int:
        """Patches of a whole video of that shape, see `options`."""
        if self.size is None:
            return int(self.inner.get_num_of_video_patches(*shape[:3], options))
        # Older releases of transformers have no such method for Qwen3-VL.
        h, w = self._size(shape[0], shape, self.size["shortest_edge"], self.size["longest_edge"])
        patch, frames = self.inner.patch_size, self.inner.temporal_patch_size
        return -(-shape[0] // frames) * (h // patch) * (w // patch)

    def options(self, frames: int, shape: tuple[int, ...]) -> dict[str, Any] | None:
        """Options under which `frames` frames of a video come out as they do among all.

        Parameters
        ----------
        shape
            (frames, height, width, channels) of the whole video.

        Returns
        -------
        dict or None
            None if no bounds on the pixels of the shorter video lead to that size.
        """
        if self.size is None or self.resize is None:
            return {}
        total = shape[0]
        expected = self._size(total, shape, self.size["shortest_edge"], self.size["longest_edge"])
        for whole in dict.fromkeys((total, total + total % 2, total - total % 2)):
            for up in (0, 1):  # the bounds must be whole numbers: rounded down, then up
                low, high = (
                    max(1, self.size[edge] * frames // whole + up)
                    for edge in ("shortest_edge", "longest_edge")
                )
                if self._size(frames, shape, low, high) == expected:
                    return {"size": {"shortest_edge": low, "longest_edge": high}}
        return None

    def _size(self, frames: int, shape: tuple[int, ...], low: int, high: int) -> tuple[int, int]:
        """(height, width) of the frames of a resized video."""
        inner, resize = self.inner, self.resize
        assert resize is not None
        return resize(
            num_frames=frames,
            height=shape[1],
            width=shape[2],
            temporal_factor=inner.temporal_patch_size,
            factor=inner.patch_size * inner.merge_size,
            min_pixels=low,
            max_pixels=high,
        )
