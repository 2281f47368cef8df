"""Videos of requests to vLLM: the frames that the transformers server takes.

By itself vLLM chooses the frames of a file by a rule of the model's family. `tokencomp serve` sets
`--media-io-kwargs '{"video": {"video_backend": "tokencomp", "num_frames": 32}}'`: the frames then
depend only on the file and on their number, and the limits on a video file apply. A policy can be
given with the number, `"frames": "stream:32"`, also in the `media_io_kwargs` of a request.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from tokencomp.serving.limits import Deadline, Limits
from tokencomp.serving.room import DECODING
from tokencomp.serving.video import decode_apart, load_file, with_request
from tokencomp.serving.vllm import LOADER

DECODERS = threading.BoundedSemaphore(DECODING)  # vLLM starts those of a request all at once
ASSUMED_RATE = 24.0  # frames per second of a file that does not say it, as in transformers


@VIDEO_LOADER_REGISTRY.register(LOADER)
class ChosenFrames(VideoLoader):
    """Chosen frames of a video file, decoded in a separate process."""

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = Limits.frames,
        frames: int | str = "",
        pixels: int = Limits.max_total_pixels,
        **kwargs: Any,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return uint8 frames (frames, height, width, 3), and when they were shown.

        `num_frames` is the largest number of them, and `frames` the policy, see
        `tokencomp.inputs.video.frames`; by default so many are evenly spaced. `pixels` is what the
        media of the request may still have, divided by its number of videos; the middleware sets
        it.
        """
        animated = Limits.max_animated_pixels * pixels // Limits.max_total_pixels
        limits = Limits(frames=num_frames, max_total_pixels=pixels, max_animated_pixels=animated)
        limits = with_request({"video": {"frames": frames}} if frames else None, limits)
        with DECODERS:
            deadline = Deadline(limits.decode_seconds)
            pictures, sampling = load_file(data, limits, deadline, decode_apart)
        rate = sampling.fps or ASSUMED_RATE
        # With `do_sample_frames` the processors of some families would take fewer of these frames.
        own = {"fps": rate, "duration": sampling.total / rate, "do_sample_frames": False}
        return pictures, {**sampling.metadata(), "video_backend": LOADER, **own}
