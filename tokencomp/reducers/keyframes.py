"""Keep tokens of some frames of a video, and none of the other frames. Ours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokencomp.errors import SpanError
from tokencomp.reducers._pixels import appearance
from tokencomp.reducers._rows import finite_features, keep_patches, whole_grid
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.registry import register_reducer
from tokencomp.reduction import Reduction
from tokencomp.tokens import VisualTokens
from tokencomp.validation import check_range


@register_reducer("keyframes")
@dataclass(frozen=True)
class KeyFrames(Reducer):
    """Choose frames of a video, and tokens of these frames alone by k-centre.

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

    def frames(self, t: int, places: int, keep: int) -> int:
        """How many of `t` frames of `places` tokens are chosen, if `keep` tokens stay."""
        return min(t, max(1, math.ceil(self.slack * keep / places - 1e-9)))

    def choose(self, count: int, looks: Tensor) -> list[int]:
        """Numbers of the chosen frames, ascending.

        Parameters
        ----------
        looks : Tensor, shape (t, d)
            What the frames look like; not read by "even".
        """
        from tokencomp.kernels import maxmin_select

        t = len(looks)
        if self.by == "even" or count == t:
            return [int((k + 0.5) * t / count) for k in range(count)]
        return sorted(maxmin_select(looks.float(), count, metric="rms").tolist())

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        from tokencomp.kernels import maxmin_select

        t, h, w = tokens.grid
        rows, budget = whole_grid(tokens, keep, self.name)
        frames = tokens.features[rows].unflatten(0, (t, h * w))
        count = self.frames(t, h * w, budget)
        if tokens.pixels is None:
            chosen = self.choose(count, finite_features(frames.flatten(1)).view_as(frames).mean(1))
        else:
            chosen = self._chosen(frames, count)
        places = rows.view(t, h * w)[torch.tensor(chosen, device=rows.device)].flatten()
        x = appearance(tokens.features[places], tokens.pixels, self.thumb)
        return keep_patches(tokens, places[maxmin_select(x, budget, metric="rms")])

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
        return self._chosen(looks[:, None], self.frames(len(looks), places, keep))

    def _chosen(self, frames: Tensor, count: int) -> list[int]:
        """Numbers of the chosen frames of pixels (t, places, d); those of NaN were not chosen."""
        missing = frames[:, 0, 0].isnan().tolist()
        there = [i for i, gone in enumerate(missing) if not gone]
        if len(there) == len(frames):
            if self.by == "thumbnails" and count < len(frames):
                raise SpanError(
                    f"{self.name} keeps {count} of {len(frames)} frames of a video, but which of "
                    "them is decided on thumbnails where the prompt is made, and this prompt has "
                    "pixels of all frames. Make it with tokencomp.inputs.prompts.build_inputs(..., "
                    "plan=handle.plan), or use make_reducer('keyframes', by='even')."
                )
            return self.choose(count, frames.mean(1))
        if len(there) != count:
            raise SpanError(
                f"{self.name} keeps {count} of {len(frames)} frames of a video, but the prompt has "
                f"pixels of {len(there)}: it was made for another plan. Make it again with "
                "tokencomp.inputs.prompts.build_inputs(..., plan=handle.plan)."
            )
        return there
