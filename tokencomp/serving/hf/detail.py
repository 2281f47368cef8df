"""The field `detail` of images and videos, which OpenAI's clients send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokencomp.errors import OptionError


def in_low_detail(details: Sequence[tuple[str, Any]]) -> bool:
    """Whether a request wants its images in low detail.

    Parameters
    ----------
    details
        For each image and video, "image_url" or "video_url", and its field `detail`.

    Raises
    ------
    OptionError
        If a video has low detail, or one image differs from another.
    """
    if ("video_url", "low") in details:
        raise OptionError('detail "low" is for images. Set a ratio for videos.')
    low = [detail == "low" for kind, detail in details if kind == "image_url"]
    if any(low) and not all(low):
        raise OptionError('detail "low" beside other images: all images of a request share it.')
    return any(low)
