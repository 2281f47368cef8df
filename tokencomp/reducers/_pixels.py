"""What reducers that compare appearance look at: features, or thumbnails of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencomp.reducers._rows import finite_features


def appearance(features: Tensor, pixels: tuple[int, int] | None, thumb: int) -> Tensor:
    """What patches look like, float32, shape (n, d).

    In the vision tower before its first block these are the pixels of a cell, averaged over squares
    of `thumb` × `thumb` inside of every patch; everywhere else the features themselves.

    Parameters
    ----------
    features : Tensor, shape (n, c)
    pixels
        See `VisualTokens.pixels`.
    """
    x = finite_features(features).float()
    if pixels is None or thumb == 1:
        return x
    height, width = pixels
    size = (max(1, round(height / thumb)), max(1, round(width / thumb)))
    pictures = x.view(len(x), -1, height, width)
    return torch.nn.functional.adaptive_avg_pool2d(pictures, size).flatten(1)
