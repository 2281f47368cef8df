"""Frames that a plan drops whole: they are decoded, but neither resized nor normalised.

`KeyFrames` in the vision tower drops frames whole. Which ones follows from the number of frames, or
from thumbnails of the decoded video, so it is known before the processor runs. The processor then
gets the other frames alone, and the pixels of those that are missing are NaN, "not computed".
Frames that are equal to an earlier one to the byte, as in recordings of screens, are processed
once, whatever the plan.

Both need a processor that treats every frame by itself: that of Qwen2-VL and Qwen2.5-VL without
`cap_pixels_per_frame`. Others process all frames, and NaN is written afterwards. `kcentre` and
`runlength` compare resized pixels of all frames, so none can be left out for them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.adapters.registry import adapter_for
from tokencomp.handle import make_plan
from tokencomp.method import MethodSpec
from tokencomp.plan import Plan
from tokencomp.reducers.keyframes import KeyFrames
from tokencomp.stages import TowerStage

SAMPLED, SIDE = 64, 16  # pixels per side that a thumbnail is taken of, and that it has


def frame_stage(plan: Plan | None) -> TowerStage | None:
    """The tower stage of a plan if it drops frames whole."""
    stage = None if plan is None else plan.tower
    if stage is None or stage.block or stage.frames_apart:
        return None
    return stage if isinstance(stage.reducer, KeyFrames) else None


def frame_plan(model: Any, spec: MethodSpec) -> Plan | None:
    """The plan of a spec in a model, if prompts for it may lack frames; else None."""
    if not spec.active:
        return None
    stage = spec.plan.tower if spec.plan is not None else None
    own = spec.built_tower_reducer if spec.plan is None and spec.dropped_cells else None
    if not isinstance(stage.reducer if stage else own, KeyFrames):
        return None
    plan = make_plan(spec, adapter_for(model))
    return plan if frame_stage(plan) else None


def with_frames(processor: Any, plan: Plan | None) -> Any:
    """A processor that handles only the frames that `plan` needs; `processor` stays as it is."""
    inner = getattr(processor, "video_processor", None)
    if inner is None:
        return processor
    result = copy.copy(processor)
    result.video_processor = FrameProcessor(inner, frame_stage(plan))
    return result


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
    return x[torch.tensor(_groups(len(x), patch))].flatten(1)


def _groups(frames: int, patch: int) -> list[list[int]]:
    """Numbers of the frames that every row of the grid reads."""
    starts = range(0, frames, patch)
    return [[min(start + i, frames - 1) for i in range(patch)] for start in starts]


class FrameProcessor:
    """A video processor that leaves out frames, and returns what belongs to them as NaN.

    Parameters
    ----------
    inner
        The video processor of transformers.
    stage
        Drops frames whole; None: none are left out, but equal ones are processed once.
    """

    def __init__(self, inner: Any, stage: TowerStage | None) -> None:
        self.inner, self.stage = inner, stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, videos: Any = None, **options: Any) -> Any:
        plain = isinstance(videos, list) and all(map(_is_video, videos))
        if not plain or not hasattr(self.inner, "temporal_patch_size"):
            return self.inner(videos, **options)
        if not self._apart(options):
            out = self.inner(videos, **options)
            return out if self.stage is None else self._marked(out, videos)
        return self._processed(videos, options)

    def _apart(self, options: dict[str, Any]) -> bool:
        """Whether the processor treats every frame by itself, at a size that is known before."""
        from transformers import Qwen2VLVideoProcessor

        capped = options.get("cap_pixels_per_frame", getattr(self, "cap_pixels_per_frame", None))
        resized = options.get("do_resize", self.inner.do_resize)
        sampled = options.get("do_sample_frames", self.inner.do_sample_frames)
        return type(self.inner) is Qwen2VLVideoProcessor and resized and not capped and not sampled

    def _processed(self, videos: Sequence[np.ndarray], options: dict[str, Any]) -> Any:
        """The output for whole videos, of which only some frames are processed."""
        needed, places = [], []
        for video in videos:
            groups = _groups(len(video), self.inner.temporal_patch_size)
            patches = self.inner.get_num_of_video_patches(*video.shape[:3], options) // len(groups)
            kept = self._kept(video, len(groups), patches)
            first, source = _distinct(video, [groups[i] for i in kept])
            needed.append(video[[n for i in first for n in groups[kept[i]]]])
            places.append((len(groups), kept, source))
        out = self.inner(needed, **options)
        grids, pixels = out["video_grid_thw"].tolist(), out["pixel_values_videos"]
        parts = pixels.split([t * h * w for t, h, w in grids])
        spread = zip(parts, grids, places, strict=True)
        out["pixel_values_videos"] = torch.cat([_spread(x, grid, *p) for x, grid, p in spread])
        lengths = torch.tensor([t for t, _, _ in places]).to(out["video_grid_thw"])
        out["video_grid_thw"] = torch.cat([lengths[:, None], out["video_grid_thw"][:, 1:]], 1)
        return out

    def _marked(self, out: Any, videos: Sequence[np.ndarray]) -> Any:
        """The output of all frames, in which those that the stage drops are NaN."""
        grids, pixels = out["video_grid_thw"].tolist(), out["pixel_values_videos"]
        parts = pixels.split([t * h * w for t, h, w in grids])
        marked = []
        for x, (t, h, w), video in zip(parts, grids, videos, strict=True):
            kept = self._kept(video, t, h * w)
            marked.append(_spread(x.view(t, h * w, -1)[kept], (len(kept), h, w), t, kept))
        out["pixel_values_videos"] = torch.cat(marked)
        return out

    def _kept(self, video: np.ndarray, t: int, patches: int) -> list[int]:
        """Rows of the grid in time that stay, of `patches` patches each."""
        if self.stage is None:
            return list(range(t))
        reducer: Any = self.stage.reducer
        places = patches // self.inner.merge_size**2
        keep = self.stage.cells([(t, 1, places)])[0]
        count = reducer.frames(t, places, keep)
        if count == t or keep == t * places:
            return list(range(t))
        return list(reducer.choose(count, thumbnails(video, self.inner.temporal_patch_size)))


def _is_video(video: Any) -> bool:
    return isinstance(video, np.ndarray) and video.ndim == 4 and video.shape[-1] == 3


def _distinct(video: np.ndarray, groups: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Numbers of the groups of frames that differ, and for every group which of these it equals."""
    known: dict[bytes, int] = {}
    first: list[int] = []
    source: list[int] = []
    for number, group in enumerate(groups):
        digest = hashlib.blake2b(np.ascontiguousarray(video[list(group)]).data).digest()
        if digest not in known:
            known[digest] = len(first)
            first.append(number)
        source.append(known[digest])
    return first, source


def _spread(
    x: Tensor, grid: Sequence[int], t: int, kept: list[int], source: list[int] | None = None
) -> Tensor:
    """Pixels of some rows of a grid in time at full length, NaN elsewhere.

    Parameters
    ----------
    x : Tensor, shape (rows · h · w, d)
    grid
        (rows, h, w) of `x`.
    t
        Rows of the whole grid.
    kept, source
        Rows of the whole grid that exist, and the row of `x` of each; None: they are in order.
    """
    rows = x.reshape(grid[0], -1, x.shape[-1])
    rows = rows if source is None or source == list(range(t)) else rows[source]
    if len(kept) == t:
        return rows.flatten(0, 1)
    full = x.new_full((t, *rows.shape[1:]), torch.nan)
    full[kept] = rows
    return full.flatten(0, 1)
