"""What reducers that compare appearance look at: features, or thumbnails of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from tokencomp.reducers._rows import finite_features
from tokencomp.tokens import VisualTokens


def appearance(tokens: VisualTokens, rows: Tensor, thumb: int) -> Tensor:
    """What rows of a span look like, float32, shape (n, d).

    In the vision tower before its first block these are the pixels of a cell, averaged over squares
    of `thumb` × `thumb` inside of every patch; everywhere else the features themselves.
    """
    x = finite_features(tokens.features[rows]).float()
    if tokens.pixels is None or thumb == 1:
        return x
    height, width = tokens.pixels
    size = (max(1, round(height / thumb)), max(1, round(width / thumb)))
    pictures = x.view(len(x), -1, height, width)
    return torch.nn.functional.adaptive_avg_pool2d(pictures, size).flatten(1)
