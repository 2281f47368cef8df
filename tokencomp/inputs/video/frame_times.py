"""Times of frames, for processors that write them into the prompt or into positions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from tokencomp.errors import FrameRateWarning
from tokencomp.inputs.video import Sampling

_READS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def frame_times(processor: Any, samplings: Sequence[Sampling]) -> dict[str, Any]:
    """Keyword arguments of the processor with the times of the frames of each video.

    Empty if its output does not depend on the frame rate; `FrameRateWarning` if it does, and the
    rate of a video is unknown.
    """
    if not samplings or not reads_times(processor):
        return {}
    unknown = sum(s.fps is None for s in samplings)
    if unknown:
        warnings.warn(
            f"the processor writes when each frame was shown, and the frame rate of {unknown} of "
            f"{len(samplings)} videos is unknown: it assumes one (24 frames per second in "
            "Qwen3-VL). A folder of frames has none: pass video files, or "
            "tokencomp.inputs.video.Video(frames, fps=...).",
            FrameRateWarning,
            stacklevel=2,
        )
    found, size = [s.metadata() for s in samplings], frames_of_a_step(processor)
    for one in found:
        at = one["frames_indices"]
        at += at[-1:] * (size - len(at))  # see `whole_steps`
    return {"video_metadata": found}


def frames_of_a_step(processor: Any) -> int:
    """Number of frames per temporal step."""
    return int(getattr(getattr(processor, "video_processor", None), "temporal_patch_size", 1))


def whole_steps(processor: Any, frames: Any) -> Any:
    """Frames (n, H, W, 3); the last is repeated if there are too few for one step.

    Processors repeat the last frame of an odd number; Qwen3-VL's refuses a single frame.
    """
    missing = frames_of_a_step(processor) - len(frames)
    return np.concatenate([frames, *[frames[-1:]] * missing]) if missing > 0 else frames


def reads_times(processor: Any) -> bool:
    """Whether the output of the processor depends on the frame rate of a video.

    Processes one short video at two rates, once per processor, instead of a list of class names.
    """
    if processor not in _READS:
        slow, fast = _probe(processor, 1.0), _probe(processor, 10.0)
        _READS[processor] = slow is not None and fast is not None and not _same(slow, fast)
    return _READS[processor]


def _probe(processor: Any, fps: float) -> dict[str, Any] | None:
    """Output of the processor for four black frames; None if it does not accept the arguments."""
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]
    try:
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return dict(
            processor(
                text=[text],
                videos=[np.zeros((4, 56, 56, 3), np.uint8)],
                video_metadata=[Sampling((0, 1, 2, 3), 4, fps).metadata()],
                do_sample_frames=False,
                return_tensors="pt",
            )
        )
    except Exception:  # processors raise undocumented types; the real call comes afterwards
        return None


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(
        torch.equal(one, second[name]) if isinstance(one, Tensor) else one == second[name]
        for name, one in first.items()
    )
