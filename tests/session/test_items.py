"""When the frames of a session were shown, and the metadata that a processor gets about it."""

from __future__ import annotations

import dataclasses

import pytest

from tokencomp.errors import FrameOrderError, OptionError
from tokencomp.inputs.video import Video
from tokencomp.session.items import FrameClock

FRAMES = [object(), object()]


def test_times_continue() -> None:
    clock = FrameClock()
    for expected in ([0.0, 0.5], [1.0, 1.5]):
        times = clock.times(FRAMES, 0.5, True)
        assert times == expected
        clock.advance(times)
    clock.advance(clock.times(FRAMES, [4, 7.25], True))
    assert (clock.last, clock.step) == (7.25, 3.25)
    with pytest.raises(FrameOrderError, match=r"the last frame was at 7\.25 s"):
        clock.times(FRAMES, [7, 8], True)
    assert clock.times(FRAMES, 1, True) == [8.25, 9.25]


def test_a_video_knows_its_times() -> None:
    video = Video(FRAMES, fps=8.0, indices=[4, 12])
    assert FrameClock().times(video, None, True) == [0.5, 1.5]
    video.sampling = dataclasses.replace(video.sampling, times=(0.25, 2.0))
    assert FrameClock().times(video, None, True) == [0.25, 2.0]


def test_times_that_nobody_reads_may_be_missing() -> None:
    assert FrameClock().times(FRAMES, None, False) is None
    with pytest.raises(OptionError, match="reads when each frame was shown"):
        FrameClock().times(FRAMES, None, True)


@pytest.mark.parametrize("times", [[0.0, 0.5], [3600.25, 3600.5], [10.0]])
def test_a_processor_gets_times_and_the_rate_of_the_frames(times: list[float]) -> None:
    """Qwen3-VL divides the numbers of frames by the rate; Qwen2.5-VL reads frames per second."""
    clock = FrameClock()
    if len(times) == 1:
        clock.advance([9.75])
    metadata = clock.sampling(times).metadata()
    assert [i / metadata["fps"] for i in metadata["frames_indices"]] == times
    step = times[1] - times[0] if len(times) > 1 else 0.25
    assert len(times) / metadata["total_num_frames"] * metadata["fps"] == pytest.approx(1 / step)
