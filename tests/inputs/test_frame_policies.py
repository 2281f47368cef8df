"""Which frames each policy takes, against plain loops, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from support.clips import pictures, write_clip

from tokencomp.errors import MediaError, OptionError, ScoreError
from tokencomp.inputs.frames import Even, Rate, Scored, frame_policy
from tokencomp.inputs.media import load_media
from tokencomp.inputs.scored import aks
from tokencomp.inputs.video import with_frames

COUNT, FPS = 72, 24


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), "h264", pictures(COUNT))


@pytest.mark.parametrize(
    ("frames", "policy"),
    [(8, Even(8)), ("8", Even(8)), (" 12 ", Even(12)), ("1fps", Rate(1)), ("0.5 fps", Rate(0.5)),
     (".25fps", Rate(0.25)), ("scorer:aks:4", Scored(4)), (Rate(2), Rate(2))],
)  # fmt: skip
def test_policies_have_a_text(frames, policy):
    assert frame_policy(frames) == policy == frame_policy(str(policy))


@pytest.mark.parametrize("frames", [0, -1, "-2fps", "0fps", "-0.5fps", "scorer:aks:0"])
def test_counts_and_rates_are_positive(clip, frames):
    with pytest.raises(OptionError, match="at least 1 frame"):
        load_media(clip, frames)


@pytest.mark.parametrize("frames", ["fps", "nanfps", "even", "scorer:8", "8 frames", 2.5, True])
def test_unknown_policies(clip, frames):
    with pytest.raises(OptionError, match="expected 8"):
        load_media(clip, frames)


@pytest.mark.parametrize("fps", [0.3, 1, 2, 7, 24])
def test_a_rate_takes_what_is_shown_in_the_middles_of_equal_times(clip, fps):
    video = load_media(clip, f"{fps}fps")
    wanted = [math.floor((k + 0.5) / fps * FPS) for k in range(max(1, round(COUNT / FPS * fps)))]
    assert [*video.sampling.indices] == wanted and video.sampling.rule == "rate"


def test_more_frames_than_the_file_has(clip, tmp_path):
    with pytest.raises(MediaError, match="24 frames per second"):
        load_media(clip, "25fps")
    assert len(load_media(clip, 100)) == COUNT  # a number is the most that a clip gives
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(MediaError, match="does not say when"):
        load_media(tmp_path, "1fps")


def test_a_scorer_sees_one_frame_per_second_and_the_question(clip):
    seen = []

    def scorer(frames, question):
        seen.append((len(frames), question))
        return [np.asarray(frame).mean() for frame in frames]

    video = load_media(clip, Scored(2, scorer), question="What moves?")
    assert seen == [(3, "What moves?")] and len(video) == 2
    assert set(video.sampling.indices) <= {12, 36, 60} and video.sampling.rule == "aks"
    assert len(load_media(clip, Scored(12, scorer))) == 12 and seen[-1][0] == 12


@pytest.mark.parametrize(
    ("scores", "message"),
    [([1.0], r"\[1\] scores for 8"), ([0.0] * 7 + [math.nan], "nan for frame 7")],
)
def test_wrong_scores(clip, scores, message):
    with pytest.raises(ScoreError, match=message):
        load_media(clip, Scored(8, lambda frames, question: scores))


def test_a_text_names_no_scorer(clip):
    with pytest.raises(OptionError, match=r"Scored\(8, scorer\)"):
        load_media(clip, "scorer:aks:8")
    with pytest.raises(OptionError, match=r'Scored\(8, scorer, "focus"\)'):
        load_media(clip, "scorer:focus:8")


def published_aks(scores, count, deepest=5):
    """The rule of 2502.21271 as its recursion, without the fill."""
    low, high = min(scores), max(scores)
    known = [(s - low) / (high - low) if high > low else 0.0 for s in scores]

    def part(places, depth):
        best = sorted(places, key=lambda k: (-known[k], k))
        top = [known[k] for k in best[:count]]
        mean = sum(known[k] for k in places) / len(places)
        if sum(top) / len(top) - mean > 0.8 or depth == deepest or len(places) < 2:
            return best[: count // 2**depth]
        middle = len(places) // 2
        return part(places[:middle], depth + 1) + part(places[middle:], depth + 1)

    return sorted(part(list(range(len(known))), 0))


@pytest.mark.parametrize("seed", range(12))
def test_aks_is_the_published_recursion(seed):
    rng = np.random.default_rng(seed)
    scores = rng.random(200) ** rng.integers(1, 40)
    if seed % 3 == 0:
        scores[50:54] += 9  # a peak that stands out
    assert aks(scores, 32) == published_aks(scores.tolist(), 32)
    for count in (1, 3, 8, 200):
        taken = aks(scores, count)
        assert len(taken) == count and taken == sorted(set(taken))
        depth = count.bit_length() - 1
        assert set(published_aks(scores.tolist(), count, min(5, depth))) <= set(taken)


def test_fewer_frames_keep_times_and_rule(clip):
    video = load_media(clip, "2fps")
    fewer = with_frames(video, [video[1], video[4]], [1, 4])
    assert fewer.sampling.indices == (video.sampling.indices[1], video.sampling.indices[4])
    assert fewer.sampling.rule == "rate" and fewer.sampling.total == COUNT
