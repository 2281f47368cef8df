"""The stream rule against plain loops over the packets of real files."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from support.clips import pictures, write_clip

from tokencomp.errors import FrameChoiceWarning
from tokencomp.inputs import stream
from tokencomp.inputs.container import VideoFile
from tokencomp.inputs.frames import frame_indices
from tokencomp.inputs.media import load_media
from tokencomp.inputs.stream import bursts, even_gaps, stream_choice

av = pytest.importorskip("av")
TOTAL, RATE = 480, 24


def quiet(events: dict[int, int]) -> np.ndarray:
    """A still picture in which a block shows from a frame on for so many frames."""
    frames = np.repeat(pictures(1, 96, 64)[:1], TOTAL, 0)
    for start, length in events.items():
        frames[start : start + length, 20:44, 30:60] = (250, 30, 30)
    return frames


def edited() -> np.ndarray:
    """A cut to another picture every second and a half."""
    shots = [pictures(36, 96, 64, seed=k) for k in range(TOTAL // 36 + 1)]
    return np.concatenate(shots)[:TOTAL]


def listed(path):
    """(pts, size, key) of every packet in the order of decoding."""
    with av.open(str(path)) as container:
        return [(p.pts, p.size, p.is_keyframe) for p in container.demux(video=0) if p.size]


def index_of(path):
    with VideoFile(lambda: av.open(str(path))) as file:
        return file.index


def strengths_by_loops(packets):
    """Strength of every frame and the number of cuts, as the rule is written down."""
    rows, latest = [], -math.inf
    for pts, size, key in packets:
        kind = "key" if key else "backward" if pts < latest else "forward"
        latest = max(latest, pts)
        rows.append((pts, size, kind))
    rows.sort()
    logs = [math.log(size + stream.HEADER) for _, size, _ in rows]

    def medians(kind):
        at = [k for k, row in enumerate(rows) if row[2] == kind]
        values, half = [logs[k] for k in at], min(stream.NEIGHBOURS, len(at) - 1)
        result = {}
        for place, k in enumerate(at):
            near = []
            for other in range(place - half, place + half + 1):
                other = abs(other)  # mirrored at the ends
                near.append(values[2 * (len(at) - 1) - other if other >= len(at) else other])
            result[k] = statistics.median(near)
        return result

    forward, backward = medians("forward"), medians("backward")
    keys = [k for k, row in enumerate(rows) if row[2] == "key"]
    renewed = stream.CUT * statistics.median(rows[k][1] for k in keys)
    others = statistics.median(logs[k] for k in range(len(rows)) if k not in keys)
    longest = max(b - a for a, b in zip(keys, [*keys[1:], len(rows)], strict=True))
    strength, cuts = [0.0] * len(rows), 0
    for k, (_, size, kind) in enumerate(rows):
        if kind == "forward":
            strength[k] = logs[k] - forward[k]
        elif kind == "backward":
            later = [j for j in forward if j > k] or [max(forward)]
            strength[k] = logs[k] - max(backward[k], forward[min(later)])
        if kind == "key" and k and k - max(j for j in keys if j < k) < stream.EARLY * longest:
            strength[k], cuts = logs[k] - others, cuts + 1
        cuts += kind != "key" and size > renewed and strength[k] >= stream.BURST
    return strength, cuts


def chosen_by_loops(packets, count, behind):
    strength, cuts = strengths_by_loops(packets)
    total = len(strength)
    if cuts >= 3 and total / RATE / (cuts + 1) < 20:
        return frame_indices(total, count)
    found = []
    for k in sorted(range(total), key=lambda k: (-strength[k], k)):
        apart = all(abs(k - other) > RATE // 4 for other in found) and k > RATE // 2
        if strength[k] >= stream.BURST and apart and len(found) < count // 2:
            found.append(k)
    return even_gaps({min(k + behind, total - 1) for k in found}, total, count)


@pytest.mark.parametrize("count", [1, 4, 8, 15])
@pytest.mark.parametrize("name", ["h264", "h264-open", "hevc", "vp9", "mpeg4"])
def test_chosen_frames_are_those_of_loops_over_all_packets(tmp_path, name, count):
    path = write_clip(tmp_path, name, quiet({100: 12, 301: 20}))
    packets = listed(path)
    strength, cuts = bursts(index_of(path).packets)
    by_loops, same = strengths_by_loops(packets)
    assert np.allclose(strength, by_loops) and cuts == same
    assert stream_choice(index_of(path), count)[0] == chosen_by_loops(
        packets, count, behind=7 if name == "vp9" else 2
    )


@pytest.mark.parametrize("seed", range(20))
def test_bursts_are_apart(seed):
    """The strongest first, none within `apart` frames of another, by loops."""
    rng = np.random.default_rng(seed)
    strength, apart, found = rng.integers(0, 5, 60) * stream.BURST, 3, []
    for k in sorted(range(60), key=lambda k: (-strength[k], k)):
        near = [other for other in found if abs(k - other) <= apart]
        if len(found) < 8 and strength[k] >= stream.BURST and k > 2 * apart and not near:
            found.append(k)
    assert stream._strongest(strength.astype(float), 8, apart) == found


@pytest.mark.parametrize("name", ["h264", "hevc", "vp9", "mpeg4"])
def test_short_events_of_a_quiet_clip_are_seen(tmp_path, name):
    events = {62: 12, 273: 12}
    path = write_clip(tmp_path, name, quiet(events))
    video = load_media(path, "stream:8")
    for start, length in events.items():
        assert any(start <= place < start + length for place in video.sampling.indices)
        assert not any(start <= place < start + length for place in frame_indices(TOTAL, 8))
    assert len(video) == 8 and video.sampling.rule.startswith("stream: ")
    again = load_media(path, "stream:8")
    assert again.sampling == video.sampling


def test_edited_clips_stay_even(tmp_path):
    video = load_media(write_clip(tmp_path, "h264", edited()), "stream:8")
    assert [*video.sampling.indices] == frame_indices(TOTAL, 8)
    assert video.sampling.rule.startswith("even: an edited clip of ")


@pytest.mark.parametrize(("name", "why"), [("mjpeg", "key frames"), ("gif", "sizes")])
def test_a_silent_stream_is_said(tmp_path, name, why):
    path = write_clip(tmp_path, name, pictures(40))
    with pytest.warns(FrameChoiceWarning, match=why):
        video = load_media(path, "stream:8")
    assert [*video.sampling.indices] == frame_indices(40, 8)
    assert video.sampling.rule.startswith("even: ")


def test_a_still_clip_has_no_burst(tmp_path):
    video = load_media(write_clip(tmp_path, "h264", quiet({})), "stream:8")
    assert [*video.sampling.indices] == frame_indices(TOTAL, 8)
    assert video.sampling.rule == "even: the stream has no burst"


@pytest.mark.parametrize("seed", range(30))
def test_gaps_are_divided_evenly(seed):
    """Against a search: the widest distance is as small as whole numbers allow."""
    rng = np.random.default_rng(seed)
    total = int(rng.integers(4, 60))
    fixed = sorted(rng.choice(total, rng.integers(0, min(6, total)), replace=False).tolist())
    count = int(rng.integers(max(1, len(fixed)), total + 5))
    places = even_gaps(fixed, total, count)
    assert len(places) == len(set(places)) == min(count, total)
    assert set(fixed) <= set(places) <= set(range(total)) and places == sorted(places)
    assert even_gaps([], total, count) == frame_indices(total, count)

    def widest(places):
        inner = [b - a for a, b in itertools.pairwise(places)]
        return max([2 * places[0] + 1, 2 * (total - 1 - places[-1]) + 1, *inner])

    def possible(width):
        """Whether frames with this distance reach from one end to the other over `fixed`."""
        needed = 0
        bounds = [-(width + 1) / 2, *fixed, total - 1 + (width + 1) / 2]
        for a, b in itertools.pairwise(bounds):
            needed += max(0, math.ceil((b - a) / width) - 1)
        return needed <= min(count, total) - len(fixed)

    best = next(w for w in range(1, 2 * total + 2) if possible(w))
    assert widest(places) <= best + 2
