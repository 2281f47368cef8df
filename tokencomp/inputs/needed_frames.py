"""Which frames of a decoded video a stage needs, before they are resized."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokencomp.plan.stages import TowerStage

SAMPLED, SIDE = 64, 16  # pixels per side that a thumbnail is taken of, and that it has


def needed_pictures(stage: TowerStage, video: np.ndarray) -> list[int]:
    """Frames of a video that a stage needs in a vision tower that takes frames one by one."""
    pictures, places = stage.frame or (1, 1)
    t = -(-len(video) // pictures)
    groups = groups_of(len(video), pictures)
    kept = kept_frames(stage, video, t, places, pictures)
    return sorted({n for i in kept for n in groups[i]})


def kept_frames(stage: TowerStage, video: np.ndarray, t: int, places: int, patch: int) -> list[int]:
    """Rows of a grid in time, of `places` tokens and `patch` frames each, that a stage keeps."""
    keep = stage.cells([(t, 1, places)])[0]
    return stage.reducer.needed_frames(t, places, keep, lambda: thumbnails(video, patch))


def thumbnails(frames: np.ndarray, patch: int) -> Tensor:
    """What the frames of a video look like, float32, shape (t, d).

    Parameters
    ----------
    frames : uint8 array, shape (frames, height, width, 3)
    patch
        Frames that one row of the grid reads; a last one that is missing repeats its predecessor.
    """
    height, width = frames.shape[1:3]
    small = frames[:, :: max(1, height // SAMPLED), :: max(1, width // SAMPLED)]
    x = torch.from_numpy(np.ascontiguousarray(small)).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.adaptive_avg_pool2d(x, SIDE).flatten(1)
    return x[torch.tensor(groups_of(len(x), patch))].flatten(1)


def groups_of(frames: int, patch: int) -> list[list[int]]:
    """Numbers of the frames that every row of the grid reads."""
    starts = range(0, frames, patch)
    return [[min(start + i, frames - 1) for i in range(patch)] for start in starts]
