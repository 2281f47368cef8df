"""Frames that a plan drops whole: they are decoded, but neither resized nor normalised.

`KeyFrames` in the vision tower drops frames whole. Which ones follows from the number of frames, or
from thumbnails of the decoded video, so it is known before the processor runs. The processor then
gets the other frames alone, and the pixels of those that are missing are NaN, "not computed".
Frames that are equal to an earlier one to the byte, as in recordings of screens, are processed
once, whatever the plan.

Both need a processor that treats every frame by itself: that of Qwen2-VL and Qwen2.5-VL, and that
of Qwen3-VL, where the size of a frame depends on their number and is asked for explicitly
(`tokencomp.inputs.frame_size`). Where a processor cannot be brought to the size that a frame has
among all frames, it processes all of them, and NaN is written afterwards. `kcentre` and `runlength`
compare resized pixels of all frames, so none can be left out for them.

The processors of LLaVA-OneVision and VILA return the pixels of every frame for itself. There, too,
only the frames that a plan needs are processed.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencomp.adapters.registry import adapter_for
from tokencomp.handle import make_plan
from tokencomp.inputs.frame_size import FrameSize
from tokencomp.inputs.needed_frames import groups_of, kept_frames, needed_pictures
from tokencomp.inputs.video import Sampling
from tokencomp.method import MethodSpec
from tokencomp.plan.plan import Plan
from tokencomp.plan.stages import TowerStage


def frame_stage(plan: Plan | None) -> TowerStage | None:
    """The tower stage of a plan if it drops frames whole."""
    stage = None if plan is None else plan.tower
    if stage is None or stage.block or (stage.frames_apart and stage.frame is None):
        return None
    return stage if stage.reducer.drops_frames else None


def frame_plan(model: Any, spec: MethodSpec) -> Plan | None:
    """The plan of a spec in a model, if prompts for it may lack frames; else None."""
    if not spec.active:
        return None
    stage = spec.plan.tower if spec.plan is not None else None
    own = spec.built_tower_reducer if spec.plan is None and spec.dropped_cells else None
    reducer = stage.reducer if stage else own
    if reducer is None or not reducer.drops_frames:
        return None
    plan = make_plan(spec, adapter_for(model))
    return plan if frame_stage(plan) else None


def with_frames(processor: Any, plan: Plan | None) -> Any:
    """A processor that handles only the frames that `plan` needs; `processor` stays as it is."""
    inner, stage = getattr(processor, "video_processor", None), frame_stage(plan)
    if inner is not None:
        result = copy.copy(processor)
        result.video_processor = FrameProcessor(inner, stage)
        return result
    if stage is not None and hasattr(processor, "needed_frames"):  # our own, of VILA
        result = copy.copy(processor)
        result.needed_frames = functools.partial(needed_pictures, stage)
        return result
    return processor


class FrameProcessor:
    """A video processor that leaves out frames, and returns what belongs to them as NaN.

    Parameters
    ----------
    inner
        The video processor of transformers.
    stage
        Drops frames whole; None: none are left out, but equal ones are processed once (by the
        processors of the Qwen families).
    """

    def __init__(self, inner: Any, stage: TowerStage | None) -> None:
        self.inner, self.stage = inner, stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, videos: Any = None, **options: Any) -> Any:
        plain = isinstance(videos, list) and all(map(_is_video, videos))
        if not plain or not videos:
            return self.inner(videos, **options)
        if self.stage is not None and self.stage.frame is not None:
            return self._pictures(videos, self.stage, options)
        if not hasattr(self.inner, "temporal_patch_size"):
            return self.inner(videos, **options)
        size = FrameSize.of(self.inner, options)
        if size is None:
            out = self.inner(videos, **options)
            return out if self.stage is None else self._marked(out, videos)
        metadata = options.get("video_metadata") or [None] * len(videos)
        pairs = zip(videos, metadata, strict=True)
        return _joined([self._processed(video, m, size, options) for video, m in pairs])

    def _processed(
        self, video: np.ndarray, metadata: Any, size: FrameSize, options: dict[str, Any]
    ) -> Any:
        """The output for a whole video, of which only some frames are processed."""
        groups = groups_of(len(video), self.inner.temporal_patch_size)
        patches = size.patches(video.shape, options) // len(groups)
        kept = self._kept(video, len(groups), patches)
        first, source = _distinct(video, [groups[i] for i in kept])
        needed = [n for i in first for n in groups[kept[i]]]
        own = size.options(len(needed), video.shape)
        if metadata or size.counts_frames:  # times of all frames, also of those that are left out
            times = metadata or Sampling(tuple(range(len(video))), len(video)).metadata()
            options = {**options, "video_metadata": [times]}
        if own is None:
            out = self.inner([video], **options)
            return out if self.stage is None else self._marked(out, [video])
        out = self.inner([video[needed]], **{**options, **own})
        ((_, h, w),) = out["video_grid_thw"].tolist()
        x, grid = out["pixel_values_videos"], (len(first), h, w)
        out["pixel_values_videos"] = _spread(x, grid, len(groups), kept, source)
        out["video_grid_thw"] = out["video_grid_thw"].new_tensor([[len(groups), h, w]])
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
        places, patch = patches // self.inner.merge_size**2, self.inner.temporal_patch_size
        return kept_frames(self.stage, video, t, places, patch)

    def _pictures(
        self, videos: Sequence[np.ndarray], stage: TowerStage, options: dict[str, Any]
    ) -> Any:
        """The output of a processor that returns the pixels of every frame for itself."""
        import transformers

        kept = [needed_pictures(stage, video) for video in videos]
        sampled = options.get("do_sample_frames", self.inner.do_sample_frames)
        apart = type(self.inner) is transformers.LlavaOnevisionVideoProcessor and not sampled
        needed = [v[k] for v, k in zip(videos, kept, strict=True)] if apart else list(videos)
        out = self.inner(needed, **options)
        full = []
        for pixels, video, rows in zip(out["pixel_values_videos"], videos, kept, strict=True):
            x = torch.as_tensor(pixels)
            whole = x.new_full((len(video), *x.shape[1:]), torch.nan)
            whole[rows] = x if apart else x[rows]
            full.append(whole)
        alike = len({x.shape for x in full}) == 1
        out["pixel_values_videos"] = torch.stack(full) if alike else full
        return out


def _joined(outs: Sequence[Any]) -> Any:
    """The outputs for single videos as the output for all of them."""
    result = outs[0]
    for name, value in list(result.items()):
        parts = [out[name] for out in outs]
        flat = [*itertools.chain.from_iterable(parts)]
        result[name] = torch.cat(parts) if isinstance(value, Tensor) else flat
    return result


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
