"""FOCUS against its steps written as plain loops, and what it scores and takes of files."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.clips import pictures, write_clip

from tokencomp.inputs.focus import focus
from tokencomp.inputs.frames import Scored, frame_policy
from tokencomp.inputs.media import load_media

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
