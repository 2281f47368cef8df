"""Which frames each policy takes, against plain loops over scores and packets."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from support.clips import pictures, write_clip
from support.trained import tiny

import tokencomp
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import FrameChoiceWarning, MediaError, ScoreError
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.media import load_media
from tokencomp.inputs.prompts import build_inputs
from tokencomp.inputs.questions import Example
from tokencomp.inputs.video import stream, with_frames
from tokencomp.inputs.video.container import VideoFile
from tokencomp.inputs.video.focus import focus
from tokencomp.inputs.video.frames import Even, Rate, Scored, frame_indices, frame_policy
from tokencomp.inputs.video.scored import aks
from tokencomp.inputs.video.scorer import EmbeddingScorer, with_scorer
from tokencomp.inputs.video.stream import bursts, even_gaps, stream_choice

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
    [([1.0], r"\[1\.0\] for 8 frames"), ([0.0] * 7 + [math.nan], "nan.*one finite number")],
)
def test_wrong_scores(clip, scores, message):
    with pytest.raises(ScoreError, match=message):
        load_media(clip, Scored(8, lambda frames, question: scores))


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


pytest.importorskip("av")


def by_loops(scores, fps, count):
    """2510.27280 step by step; the statistics of arms count the second round, too."""
    total, rng = len(scores), np.random.default_rng(42)
    regions = max(8, math.ceil(total / fps / 16))
    stride = max(1, total // regions)
    number = total // stride
    size = total // number
    arms = [list(range(k * size, (k + 1) * size)) for k in range(number)]
    seen = {}
    for arm in arms:
        middle = (arm[0] + arm[-1]) // 2
        others = [p for p in arm if p != middle]
        seen[middle] = scores[middle]
        if others:
            for p in rng.choice(others, size=min(2, len(others)), replace=False):
                seen[int(p)] = scores[p]

    def ranking():
        bounds = []
        samples = sum(p in seen for arm in arms for p in arm)
        for arm in arms:
            own = [seen[p] for p in arm if p in seen]
            mean = sum(own) / len(own)
            variance = max(sum((s - mean) ** 2 for s in own) / len(own), 1e-6)
            log = math.log(samples)
            bounds.append(mean + math.sqrt(2 * log * variance / len(own)) + 3 * log / len(own))
        return sorted(range(len(arms)), key=lambda k: -bounds[k])

    fine = []
    for k in ranking()[: max(4, math.ceil(0.25 * number))]:
        middle = (arms[k][0] + arms[k][-1]) // 2
        half = max(1, round(total / regions / 2))
        window = list(range(max(0, middle - half), min(total - 1, middle + half) + 1))
        wanted = max(1, len(window) // min(max(1, round(fps)), stride))
        even = round(wanted / 2)
        for m in range(even):
            p = window[int((m + 0.5) * len(window) / even)]
            if p not in seen and p not in fine:
                fine.append(p)
        free = [p for p in window if p not in seen and p not in fine]
        if wanted - even and free:
            drawn = rng.choice(free, size=min(wanted - even, len(free)), replace=False)
            fine += [int(p) for p in drawn]
    seen |= {p: scores[p] for p in fine}
    best = sorted(seen, key=lambda p: (-seen[p], p))
    taken = best[: round(0.2 * min(count, len(seen)))]
    spacing = total / fps / count
    gap = 0 if spacing <= 0.2 else round(min(1.0, spacing / 4) * fps)
    rest, top = count - len(taken), ranking()[: min(32, max(4, math.ceil(0.25 * number)))]
    for rank, k in enumerate(top):
        wanted = rest // len(top) + (1 if rank < rest % len(top) else 0)
        free = [p for p in arms[k] if p not in taken]
        far = [p for p in free if min((abs(p - q) for q in taken), default=gap) >= gap] or free
        if not wanted or not far:
            continue
        own = sorted(p for p in arms[k] if p in seen)
        near = [seen[min(own, key=lambda q, p=p: abs(q - p))] for p in far]
        low, high = min(near), max(near)
        logits = [((s - low) / (high - low) if high > low else 1.0) / 0.06 for s in near]
        weights = [math.exp(x - max(logits)) for x in logits]
        chances = [w / sum(weights) for w in weights]
        drawn = rng.choice(len(far), size=min(wanted, len(far)), p=chances, replace=False)
        taken += [far[m] for m in drawn]
    taken += [p for p in best if p not in taken][: count - len(taken)]
    return sorted(taken)


@pytest.mark.parametrize("fps", [1.0, 8.0, 24.0, 30.0])
@pytest.mark.parametrize("count", [1, 4, 8, 32, 64])
def test_focus_is_the_published_method(fps, count):
    for seed, total in enumerate((120, 999, 4096)):
        rng = np.random.default_rng(seed)
        scores = rng.random(total) ** rng.integers(1, 9)
        rounds = []

        def score(places, scores=scores, rounds=rounds):
            rounds.append([*places])
            return {p: float(scores[p]) for p in sorted(places)}

        taken = focus(score, total, fps, count)
        assert taken == by_loops(scores.tolist(), fps, count)
        assert len(taken) == count == len(set(taken))
        assert taken == focus(lambda p, s=scores: {k: float(s[k]) for k in p}, total, fps, count)
        first, second = rounds
        assert len({*first, *second}) == len(first) + len(second) <= total


def test_frames_that_cannot_be_read_have_no_score():
    taken = focus(lambda places: {p: 0.1 * p for p in places if p < 100}, 400, 24.0, 16)
    assert len(taken) == 16
    assert focus(lambda places: {}, 400, 24.0, 4) == [0, 1, 2, 3]


def test_chosen_frames_of_a_file(tmp_path):
    clip = write_clip(tmp_path, "h264", pictures(72))
    asked = []

    def scorer(frames, question):
        asked.append(len(frames))
        return [float(np.asarray(frame)[..., 0].mean()) for frame in frames]

    policy = Scored(4, scorer, "focus")
    assert str(policy) == "scorer:focus:4"
    assert frame_policy("scorer:focus:4") == Scored(4, None, "focus")
    video = load_media(clip, policy)
    assert len(asked) == 2 and len(video) == 4 and video.sampling.rule == "focus"
    whole = load_media(clip, 72)
    for place, frame in zip(video.sampling.indices, video, strict=True):
        assert np.array_equal(np.asarray(frame), np.asarray(whole[place]))
    assert load_media(clip, policy).sampling == video.sampling


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
    # Without it, sizes of packets depend on where the encoder's memory is: some runs have a burst.
    same = {"x264-params": "cpu-independent=1"}
    video = load_media(write_clip(tmp_path, "h264", quiet({}), **same), "stream:8")
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


pytest.importorskip("av")
QUESTION = "What moves?"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"))


def by_hand(model, processor, frame):
    inputs = build_inputs(processor, [[frame]], [QUESTION])
    with torch.no_grad():
        rows = model(**inputs, output_hidden_states=True).hidden_states[0][0]
    places = adapter_for(model).placeholders
    visual = [token in places for token in inputs["input_ids"][0].tolist()]
    text = [row / row.norm() for row, seen in zip(rows, visual, strict=True) if not seen]
    mean = sum(text) / len(text)
    return max(float(row @ mean / row.norm() / mean.norm())
               for row, seen in zip(rows, visual, strict=True) if seen)  # fmt: skip


def test_scores_are_cosines_of_the_decoder_input(loaded):
    model, processor = loaded
    colours = [(200, 30, 30), (30, 200, 30), (240, 240, 240)]
    frames = [Image.new("RGB", (56, 56), colour) for colour in colours]
    expected = [by_hand(model, processor, frame) for frame in frames]
    scorer = EmbeddingScorer(model, processor)
    assert np.allclose(scorer(frames, QUESTION), expected, atol=1e-5)
    with tokencomp.patch(model, 0.5):
        assert np.allclose(scorer(frames, QUESTION), expected, atol=1e-5)


def test_texts_get_the_model_as_their_scorer(loaded, clip):
    policy = with_scorer("scorer:aks:2", *loaded)
    assert isinstance(policy, Scored) and str(policy) == "scorer:aks:2"
    assert len(load_media(clip, policy, question=QUESTION)) == 2
    own = Scored(2, lambda frames, question: [0.0] * len(frames))
    assert with_scorer(own, *loaded) is own and with_scorer(8, *loaded) == 8


def test_records_of_an_evaluation_say_which_frames(loaded, clip):
    questions = [Example("one", QUESTION, "block", (str(clip),))]
    for frames, kept in (("1fps", 3), ("scorer:aks:2", 2), ("stream:2", 2)):
        (run,) = sweep(*loaded, questions, [Setting()], frames=frames, progress=False,
                       max_new_tokens=1).values()  # fmt: skip
        (record,) = run.records
        ((rule, *places),) = record["frames"]
        assert len(places) == kept and run.manifest["identity"]["frames"] == frames
        sampling = load_media(clip, with_scorer(frames, *loaded), question=QUESTION).sampling
        assert (rule, *places) == (sampling.rule, *sampling.indices)
    for frames in (2, "2", Even(2)):
        (run,) = sweep(*loaded, questions, [Setting()], frames=frames, progress=False,
                       max_new_tokens=1).values()  # fmt: skip
        assert "frames" not in run.records[0] and run.manifest["identity"]["frames"] == 2
