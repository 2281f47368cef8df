"""Clips of photographs: answers are counted again from the pixels of drawings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.photographs import COLORS, Drawings

from recipes.photographs.clip_questions import CLIP_FAMILIES, ClipItem, clip_items
from recipes.photographs.clips import RATE, SIZE, clip_frames

SECONDS = 10.0
STEP = 4  # px between the pixels that are looked at
Box = tuple[float, float, float]


def seen(one: ClipItem) -> list[dict[str, Box]]:
    """Center and area, in steps, of every thing in every frame, from its colour alone."""
    found = []
    for pixels in clip_frames(replace(one.scene, grain=0.0), Drawings(), SIZE):
        some, boxes = pixels[::STEP, ::STEP].astype(int), {}
        for name, color in COLORS.items():
            y, x = np.nonzero(np.abs(some - color).max(-1) < 30)
            if len(x) > 6:
                boxes[name] = (float(x.mean()), float(y.mean()), float(len(x)))
        found.append(boxes)
    return found


def answer_from_pixels(one: ClipItem) -> str:
    frames, words = seen(one), one.question.rstrip("?").split()
    every = {name for boxes in frames for name in boxes}
    start, end = set(frames[0]), set(frames[-1])
    came = {name: next(k for k, f in enumerate(frames) if name in f) for name in every}
    if one.family == "existence":
        return "yes" if words[3] in every else "no"
    if one.family == "first":
        return min((words[4], words[7]), key=lambda name: came[name])
    if one.family == "direction":
        a, b = frames[0][words[5]], frames[-1][words[5]]
        x, y = b[0] - a[0], b[1] - a[1]
        return ("left", "right")[x > 0] if abs(x) > abs(y) else ("up", "down")[y > 0]
    if one.family == "camera":
        (name, *_) = start & end
        a, b = frames[0][name], frames[-1][name]
        if max(a[2], b[2]) > 1.3 * min(a[2], b[2]):
            return "zooms in" if b[2] > a[2] else "zooms out"
        return "pans left" if b[0] > a[0] else "pans right"
    (answer,) = {"appears": end - start, "leaves": start - end, "moment": every - start - end}[
        one.family
    ]
    return answer


@pytest.mark.parametrize(
    "group",
    [pytest.param(n, marks=[pytest.mark.long] * (i > 1)) for i, n in enumerate(CLIP_FAMILIES)],
)
def test_answers_follow_from_the_pixels(group: str) -> None:
    answers = set()
    for one in clip_items(Drawings(), "test", 5, (group,), SECONDS):
        stays = [a.start == 0 and a.end == SECONDS for a in one.scene.acts]
        if group == "camera" and not any(stays):
            continue  # nothing is in both frames that the oracle compares
        assert one.answer == answer_from_pixels(one), one.id
        assert one.answer in one.options and len(set(one.options)) == len(one.options)
        answers.add(one.answer)
    assert len(answers) > 1


def test_splits_share_no_clip_and_files_hold_every_frame(tmp_path: Path) -> None:
    import av

    scenes = [
        {repr(one.scene.acts) for one in clip_items(Drawings(), split, 10, ("appears",))}
        for split in ("train", "validation", "test")
    ]
    assert not scenes[0] & scenes[1] | scenes[1] & scenes[2] | scenes[0] & scenes[2]
    (one,) = clip_items(Drawings(), "test", 1, ("moment",), SECONDS)
    with av.open(str(one.write(tmp_path / "clip.mp4", 64))) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert file.streams.video[0].average_rate == RATE
    assert len(frames) == one.scene.frames and frames[0].shape == (64, 64, 3)
