"""What chosen frames are worth: accuracy on clips of two minutes, by rule, count and background.

    python -m benchmarks.files.accuracy            # test clips: accuracy.json, accuracy.md
    python -m benchmarks.files.accuracy --report   # only rebuilds the page

Questions of every video family of ShapesQA about 240 logical frames of half a second. Every clip is
encoded three times: with a static camera, in noise, and with a panning camera. Rules choose 8, 16
and 32 frames, and the model answers from these; 32 frames also at ratio 0.75, where they cost the
decoder what 8 whole ones cost. The questions come in rounds of one per family, so that a run that
stops early (`--minutes`) has families and backgrounds alike; what is done is on disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiment import Experiment
from benchmarks.files.accuracy_page import COUNTS, RATIO, page, records
from benchmarks.files.material import BACKGROUNDS, RATE, X264
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import Setting
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.media import open_clip
from tokencomp.inputs.questions import Example
from tokencomp.inputs.video import Sampling, Video
from tokencomp.inputs.video.frames import Even, Policy, Scored, Stream, frame_indices
from tokencomp.inputs.video.packets import ClipIndex
from tokencomp.inputs.video.scorer import EmbeddingScorer
from tokencomp.zoo.shapesqa.items import Item, item
from tokencomp.zoo.shapesqa.questions import VIDEO_FAMILIES
from tokencomp.zoo.shapesqa.render import canvas_of, paint
from tokencomp.zoo.shapesqa.scenes import Look

FAMILIES = (*VIDEO_FAMILIES, "video_existence")
LOGICAL, HOLD = 240, RATE // 2
GROUP = {"g": str(2 * RATE)}  # a key frame every two seconds: 60 of a clip
LOOKS = {"static": Look(), "noisy": Look(grain=4.0), "panning": Look(pan=(-6.0, 0.0))}
Choose = Callable[[int], Sequence[int]]


def write(one: Item, background: str, path: Path) -> None:
    """The clip of a question, in which things move smoothly; H.264."""
    import av

    scene = replace(one.scene, look=LOOKS[background])
    canvas = canvas_of(scene)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options={**X264, **GROUP})
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(LOGICAL * HOLD):
            picture = paint(scene, number / HOLD, canvas)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def key_frames(index: ClipIndex, count: int) -> list[int]:
    """Key frames alone, evenly spaced among themselves."""
    assert index.packets is not None  # these clips are H.264
    keys = np.flatnonzero(index.packets.keys)
    return [int(keys[k]) for k in frame_indices(len(keys), count)]


def evidence(one: Item) -> frozenset[int]:
    """Numbers of the frames that show the answer; empty if all do, or none can."""
    shown = one.evidence.frames
    some = shown if 0 < len(shown) < LOGICAL else ()
    return frozenset(k * HOLD + n for k in some for n in range(HOLD))


def known(one: Item, total: int, count: int) -> list[int]:
    """The middle of every showing of the evidence, and even frames beside these: the ceiling."""
    shown = one.evidence.frames if evidence(one) else ()
    fixed = [k * HOLD + HOLD // 2 for k in shown][:count]
    others = [p for p in frame_indices(total, count) if p not in fixed]
    rest = [others[k] for k in frame_indices(len(others), count - len(fixed))]
    return sorted([*fixed, *rest])


def chosen(path: Path, one: Item, scorer: Any) -> Iterator[tuple[str, int, Video]]:
    """The frames of every rule and count, as `load_media` gives them."""
    known_scores: dict[tuple[int, ...], list[float]] = {}
    candidates: list[int] = []
    with open_clip(path) as clip:
        index = clip.index

        def decode(places: Sequence[int]) -> tuple[list[int], list[Any]]:
            read = clip.read(places, None)
            candidates[:] = sorted(read)
            return sorted(read), [read[place] for place in sorted(read)]

        def score(frames: Sequence[Any], question: str) -> list[float]:
            key = tuple(candidates)  # a rule has the same candidates for every count
            if key not in known_scores:
                known_scores[key] = scorer(frames, question)
            return known_scores[key]

        def by(policy: Callable[[int], Policy]) -> Choose:
            return lambda count: policy(count).choose(index, decode, one.question).places

        rules: dict[str, Choose] = {
            "even": by(Even),
            "stream": by(Stream),
            "key frames": lambda count: key_frames(index, count),
            "aks": by(lambda count: Scored(count, score)),
            "focus": by(lambda count: Scored(count, score, "focus")),
            "known": lambda count: known(one, index.total, count),
        }
        places = {(r, c): tuple(rule(c)) for r, rule in rules.items() for c in COUNTS}
        pictures = clip.read(sorted({p for some in places.values() for p in some}), None)
    for (rule, count), some in places.items():
        sampling = Sampling(some, index.total, index.fps, index.uneven_times(some), rule)
        yield rule, count, Video.of([pictures[p] for p in some], sampling)


def shown(one: Item, video: Video) -> list[int]:
    """How many showings of the evidence the frames have, and how many there are."""
    every = evidence(one)
    seen = {p // HOLD for p in video.sampling.indices if p in every}
    return [len(seen), len(every) // HOLD]


def ask(model: Any, processor: Any, scorer: Any, one: Item) -> list[dict[str, Any]]:
    """A row per background: what the model answers from the frames of each rule."""
    rows: dict[str, dict[str, Any]] = {}
    examples: dict[int, list[Example]] = {count: [] for count in COUNTS}
    costs: dict[str, list[float]] = {background: [] for background in BACKGROUNDS}
    for background in BACKGROUNDS:
        rows[background] = {
            "id": one.id, "family": one.family, "background": background,
            "answer": one.answer, "options": list(one.options),
            "shown": {}, "right": {},
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write(one, background, path)
            for rule, count, video in chosen(path, one, scorer):
                name = f"{background}|{rule} {count}"
                example = Example(name, one.question, one.answer, (video,), one.family)
                examples[count].append(example)
                rows[background]["shown"][f"{rule} {count}"] = shown(one, video)
    for count, some in examples.items():
        settings = [Setting(), *([Setting("auto", RATIO)] if count == max(COUNTS) else [])]
        runs = sweep(
            model, processor, some, settings, batch_size=5, max_new_tokens=4, progress=False
        )
        for setting, run in runs.items():
            for record in run.answered:
                background, _, key = record["id"].partition("|")
                key += f" at {setting.ratio:g}" if setting.ratio else ""
                rows[background]["right"][key] = int(record["correct"])
                if setting.ratio:
                    costs[background].append(record["ratio"])
    return [{**rows[b], "ratio": round(float(np.mean(costs[b])), 4)} for b in BACKGROUNDS]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows until the questions or the minutes of CPU time are used up."""
    torch.set_num_threads(1)
    model, processor = load_model(args.model)
    scorer, rows = EmbeddingScorer(model, processor), []
    for number in range(args.items):
        if time.process_time() > 60 * args.minutes:
            return
        for family in FAMILIES:
            one = item(args.split, family, number, frames=LOGICAL)
            rows += ask(model, processor, scorer, one)
            cpu = round(time.process_time())
            yield {"model": args.model, "split": args.split, "cpu": cpu, "rows": rows}
            print(one.id, cpu, flush=True)


OPTIONS = {
    "model": "tiny-qwen3-vl-hard",
    "split": ("test", "", ("validation", "test")),
    "items": (20, "questions of a family"),
    "minutes": (40.0, "CPU time after which it stops"),
}
EXPERIMENT = Experiment("files/accuracy", measure, page, records, OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
