"""Keep tokens of some frames of a video, and none of the other frames. Ours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from tokencomp.errors import SpanError
from tokencomp.reducers._batch import Patches, evenly, stacks
from tokencomp.reducers._pixels import NO_PIXELS, appearance
from tokencomp.reducers._rows import finite_features
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.tokens.reduction import Reduction
from tokencomp.tokens.spans import SpanBatch
from tokencomp.validation import check_range


@register_reducer("keyframes")
@dataclass(frozen=True)
class KeyFrames(Reducer):
    """Choose frames of a video, and tokens of these frames alone by k-centre.

    Distances are those of averages of pixels, without contrast and change.

    All tokens of the other frames are dropped, so their pixels are not needed: with a stage in the
    vision tower, `tokencomp.inputs` leaves them out of the prompt before they are resized,
    normalised and embedded. A frame is one step of the grid in time: two frames of the video in the
    Qwen families.

    The number of chosen frames follows from the keep count alone. k-centre chooses the tokens of an
    image. In the vision towers of LLaVA-OneVision and VILA, which take frames one by one, the
    chosen frames share the budget equally; in those of other families that do (LLaVA-NeXT-Video,
    InternVL, SmolVLM), and before later blocks of the tower, no frame is dropped whole, and
    k-centre chooses equally many tokens of every frame.

    Attributes
    ----------
    by : {"thumbnails", "even"}
        "thumbnails": the frames that differ most, by k-centre. In the vision tower before its first
        block, thumbnails of the video are compared where prompts are made, and pixels of frames
        that are not chosen are NaN; elsewhere the means of the frames' features are compared.
        "even": evenly spaced frames, whatever they show.
    slack : float
        The chosen frames have this many times the tokens that stay, at least 1. With 1, chosen
        frames stay whole; a larger number processes more frames and lets their tokens compete.
    thumb : int
        See `kcentre`.
    """

    by: Literal["thumbnails", "even"] = "thumbnails"
    slack: float = 1.5
    thumb: int = 4

    summary = "tokens of the frames that differ most, nothing of the others (ours)"
    whole_spans = True
    drops_frames = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "slack", self.slack, 1, 100)
        check_range(self.name, "thumb", self.thumb, 1, 64)

    def idle(self, pixels: bool) -> dict[str, str]:
        return {} if pixels else {"thumb": NO_PIXELS}

    def frames(self, t: int, places: int, keep: int) -> int:
        """How many of `t` frames of `places` tokens are chosen, if `keep` tokens stay."""
        return min(t, max(1, math.ceil(self.slack * keep / places - 1e-9)))

    @property
    def reads_thumbnails(self) -> bool:
        return self.by == "thumbnails"

    def needed_frames(
        self, t: int, places: int, keep: int, looks: Callable[[], Tensor]
    ) -> list[int]:
        """Numbers of the chosen frames, ascending; see `StageReducer.needed_frames`."""
        from tokencomp.kernels import maxmin_select

        count = self.frames(t, places, keep)
        if count == t or keep == t * places:
            return list(range(t))
        if not self.reads_thumbnails:
            return [int(i) for i in evenly(t, count)]
        return sorted(maxmin_select(looks().float(), count, metric="rms").tolist())

    def reduce_batch(self, batch: SpanBatch, keeps: Sequence[int]) -> Reduction:
        from tokencomp.kernels import maxmin_select

        patches = Patches.whole(batch, keeps, self.name)
        pairs = list(zip(batch.grids, patches.budgets, strict=True))
        counts = [self.frames(t, h * w, budget) for (t, h, w), budget in pairs]
        first = patches.table(_first_patches(patches))
        frames = self._chosen(patches, counts, first)
        areas = np.repeat([h * w for _, h, w in batch.grids], counts)
        rows = patches.table(np.repeat(np.arange(len(areas)), areas))
        within = patches.table(np.concatenate([np.arange(area) for area in areas]))
        places = first.index_select(0, frames).index_select(0, rows) + within
        x = patches.features.index_select(0, places)
        x = appearance(x, batch.pixels, self.thumb)
        lengths = [n * h * w for n, (_, h, w) in zip(counts, batch.grids, strict=True)]
        kept = maxmin_select(x, patches.budgets, spans=lengths, metric="rms")
        return patches.kept(places.index_select(0, kept))

    def chosen_frames(self, looks: Tensor, places: int, keep: int) -> list[int]:
        """Numbers of the chosen frames in a vision tower that takes frames one by one.

        Parameters
        ----------
        looks : Tensor, shape (t, d)
            Pixels of the frames; those of frames that were not chosen are NaN.
        places
            Tokens of one frame.
        keep
            Tokens of the video that stay.

        Raises
        ------
        SpanError
            Pixels of other frames are missing than the keep count asks for.
        """
        missing = looks[:, 0].isnan().tolist()
        return self._with_pixels(missing, self.frames(len(looks), places, keep))

    def _chosen(self, patches: Patches, counts: list[int], first: Tensor) -> Tensor:
        """Numbers of the chosen frames among all frames of the batch, ascending, int64.

        Parameters
        ----------
        counts
            How many frames of every span are chosen.
        first : Tensor of int64, shape (frames,)
            First patch of every frame of the batch.
        """
        from tokencomp.kernels import maxmin_select

        depths = [t for t, _, _ in patches.batch.grids]
        if patches.batch.pixels is not None:
            missing = patches.features.index_select(0, first)[:, 0].isnan().tolist()
            lists = [
                self._with_pixels(missing[at : at + t], count)
                for at, t, count in zip(_starts(depths), depths, counts, strict=True)
            ]
        elif self.reads_thumbnails:
            looks = _means(patches, len(first)).float()
            chosen: Tensor = maxmin_select(looks, counts, spans=depths, metric="rms")
            return chosen
        else:
            lists = [[int(i) for i in evenly(t, n)] for t, n in zip(depths, counts, strict=True)]
        starts = _starts(depths)
        return patches.table([at + i for at, own in zip(starts, lists, strict=True) for i in own])

    def _with_pixels(self, missing: list[bool], count: int) -> list[int]:
        """Numbers of the chosen frames of a span with pixels; those of NaN were not chosen."""
        present = [i for i, gone in enumerate(missing) if not gone]
        if len(present) == len(missing):
            if self.reads_thumbnails and count < len(missing):
                raise SpanError(
                    f"{self.name} keeps {count} of {len(missing)} frames of a video, but which of "
                    "them is decided on thumbnails where the prompt is made, and this prompt has "
                    "pixels of all frames. Make it with tokencomp.inputs.prompts.build_inputs(..., "
                    "plan=handle.plan), or use make_reducer('keyframes', by='even')."
                )
            return [int(i) for i in evenly(len(missing), count)]
        if len(present) != count:
            raise SpanError(
                f"{self.name} keeps {count} of {len(missing)} frames of a video, but the prompt "
                f"has pixels of {len(present)}: it was made for another plan. Make it again with "
                "tokencomp.inputs.prompts.build_inputs(..., plan=handle.plan)."
            )
        return present


def _starts(lengths: list[int]) -> list[int]:
    """Where each of several runs of these lengths starts."""
    return list(itertools.accumulate(lengths[:-1], initial=0))


def _first_patches(patches: Patches) -> list[int]:
    """The first patch of every frame of every span."""
    pairs = zip(patches.starts, patches.batch.grids, strict=True)
    return [start + i * h * w for start, (t, h, w) in pairs for i in range(t)]


def _means(patches: Patches, frames: int) -> Tensor:
    """Mean features of every frame, shape (frames, d); frames of one size are read together."""
    x, grids = finite_features(patches.features), patches.batch.grids
    starts, means = _starts([t for t, _, _ in grids]), x.new_empty(frames, x.shape[1])
    for members, rows in stacks(patches, [(h, w) for _, h, w in grids]):
        _, h, w = grids[members[0]]
        own = x if rows is None else x.index_select(0, rows)
        numbers = [np.arange(starts[m], starts[m] + grids[m][0]) for m in members]
        means[patches.table(np.concatenate(numbers))] = own.unflatten(0, (-1, h * w)).mean(1)
    return means
