"""Qwen3-VL and its MoE variant: deepstack features, timestamps between the frames of a video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokencomp.adapters.base import ENCODED
from tokencomp.adapters.call import Call
from tokencomp.adapters.encoded import encoded_by_kind
from tokencomp.adapters.qwen_vl import Qwen2VLAdapter
from tokencomp.adapters.registry import register_adapter
from tokencomp.errors import SpanError
from tokencomp.tokens.spans import Grid, VisualSpan


@register_adapter
class Qwen3VLAdapter(Qwen2VLAdapter):
    """A video is one span of all its frames; the timestamps between them are text.

    Features of intermediate vision layers ("deepstack", arXiv 2406.04334) are added to the hidden
    states of visual tokens after each of the first decoder layers, so they are gathered with the
    tokens at entry, and tokens can leave between layers only after the last addition.
    """

    family = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")

    def check_video(self) -> None:
        """Frames have positions of their own, like images: every release gets them right."""

    def spans(self, call: Call) -> list[list[VisualSpan]]:
        lengths = iter(video_lengths(call, self.model.config.vision_config.spatial_merge_size))
        return [
            list(_join_frames(self.row_spans(call, b), lengths, b))
            for b in range(call.kinds.shape[0])
        ]

    def _token_grids(self, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
        grids = super()._token_grids(inputs, kind)
        return [(1, h, w) for t, h, w in grids for _ in range(t)]  # text stands between frames


def video_lengths(call: Call, merge: int) -> list[int]:
    """Tokens of every video of the batch, in order, from the grids or from encoded features."""
    grids = call.inputs.get("video_grid_thw")
    if grids is not None:
        lengths: list[int] = (grids.prod(-1) // merge**2).tolist()
        return lengths
    return encoded_by_kind(call.inputs.get(ENCODED)).get("video", [])


def _join_frames(spans: list[VisualSpan], lengths: Iterator[int], row: int) -> Iterator[VisualSpan]:
    frames: list[VisualSpan] = []
    missing = 0
    for span in spans:
        if span.kind == "image":
            yield span
            continue
        missing = missing if frames else next(lengths, span.length)
        frames.append(span)
        missing -= span.length
        if missing == 0:
            yield _video(frames)
            frames = []
    if frames:
        raise SpanError(
            f"sample {row}: video tokens {frames[0].start} … {frames[-1].stop - 1} are not whole "
            "videos: their frames do not add up to the grids of the encoded videos. Pass the "
            "processor's input_ids and video_grid_thw of the same prompt."
        )


def _video(frames: list[VisualSpan]) -> VisualSpan:
    """Frames of one video, and the text between them, as one span."""
    start, stop = frames[0].start, frames[-1].stop
    _, rows, cols = frames[0].grid
    frame_columns = {column for f in frames for column in range(f.start, f.stop)}
    text = tuple(column - start for column in range(start, stop) if column not in frame_columns)
    return VisualSpan(start, stop - start, (len(frames), rows, cols), "video", text=text)
