"""CPU seconds from a file to frames: what each reader and policy costs, part by part.

    python -m benchmarks.files.clock            # writes clock.json and clock.md beside this file
    python -m benchmarks.files.clock --report   # only rebuilds the page

The clip is 720p, 24 frames per second, H.264 (x264 veryfast, its own distance of key frames): two
minutes of a pattern with moving blocks, and an hour made of the same packets. CPU seconds are those
of a process of its own, all threads together, so that other work on the machine does not count.
What follows the frames has the shape of LLaVA-OneVision 0.5B with random weights, with and without
compression.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import publishing
from benchmarks.experiment import Experiment

RATE, SECONDS, WIDTH, HEIGHT = 24, 120, 1280, 720
COPIES = {"one image": 0, "2 minutes": 1, "1 hour": 30}
CASES: tuple[dict[str, Any], ...] = (
    {"frames": 8}, {"frames": "stream:8"}, {"frames": 32}, {"frames": "stream:32"},
    {"frames": 32, "size": 448}, {"frames": "1fps", "size": 448},
    {"frames": 8, "decoder": "torchcodec"}, {"frames": 32, "decoder": "torchcodec"},
)  # fmt: skip
CHILD = """
import gc, json, sys, time
import torch
torch.set_num_threads(1)
from tokencomp.inputs.clock import file_times
from tokencomp.inputs.media import load_media
import av
gc.freeze()  # else reading packets starts a collection of all that the imports made
path, case = sys.argv[1], json.loads(sys.argv[2])
start = time.process_time()
if case.get("all"):
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        count = sum(1 for _ in container.decode(video=0))
    print(json.dumps({"decode": time.process_time() - start, "taken": count}))
else:
    with file_times() as parts:
        media = load_media(path, **case)
    taken = len(media) if isinstance(media, list) else 1
    rule = media.sampling.rule if isinstance(media, list) else ""
    whole = time.process_time() - start
    print(json.dumps({**parts, "whole": whole, "taken": taken, "rule": rule}))
"""
MODEL, PER_FRAME = "llava-onevision-0.5b", 196
WORK = ((8, {}), (8, {"ratio": 0.75}), (32, {}), (32, {"ratio": 0.75}),
        (32, {"ratio": 0.75, "tower_ratio": 0.6}))  # fmt: skip
"""Frames, and the arguments of `tokencomp.patch`."""
BEHIND = """
import dataclasses, json, sys, time
import torch
torch.set_num_threads(1)
import tokencomp
from benchmarks.models import shapes
from tokencomp.evaluation import timing
from benchmarks.models.shapes import ARCHITECTURES
class CPU:
    mark = staticmethod(time.process_time)
    def between(self, start, stop):
        return stop - start
    def finish(self):
        pass
name, frames, per_frame, given = sys.argv[1], *map(int, sys.argv[2:4]), json.loads(sys.argv[4])
model, inputs = shapes.build(name, frames * per_frame, dtype=torch.bfloat16)
inputs = shapes.accepted(model, inputs)
one = ARCHITECTURES[shapes.SHAPES[name].family].inputs(per_frame, torch.bfloat16, "cpu")
with tokencomp.patch(model, **{"ratio": 0.0, **given}) as handle:
    timing.prefill_split(model, shapes.accepted(model, one), CPU())  # the first call of kernels
    split = timing.prefill_split(model, inputs, CPU())
print(json.dumps(dataclasses.asdict(split)))
"""


def picture(number: int, pattern: np.ndarray) -> np.ndarray:
    """A pattern that drifts slowly, with three blocks that move."""
    frame = np.roll(pattern, number // 6, axis=1)
    for k in range(3):
        left = (7 + 3 * k) * number % (WIDTH - 160)
        top = (HEIGHT // 4) * (k + 1) - 80
        frame[top : top + 120, left : left + 160] = (240, 80 * k, 40)
    return frame


def write(path: Path) -> None:
    """Two minutes of video."""
    import av

    small = np.random.default_rng(0).integers(30, 200, (HEIGHT // 16, WIDTH // 16, 3))
    pattern = small.repeat(16, 0).repeat(16, 1).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(RATE * SECONDS):
            frame = av.VideoFrame.from_ndarray(picture(number, pattern), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def repeat(path: Path, out: Path, copies: int) -> None:
    """The packets of a file again and again; nothing is encoded."""
    import av

    with av.open(str(out), "w") as container:
        stream: Any = None
        for copy in range(copies):
            with av.open(str(path)) as source:
                given = source.streams.video[0]
                stream = stream or container.add_stream_from_template(given)
                shift = int(copy * SECONDS / given.time_base)
                for packet in source.demux(given):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = stream
                        container.mux(packet)


def measured(path: Path, case: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of one case in a process of its own; "error" if its decoder is missing."""
    command = [sys.executable, "-c", CHILD, str(path), json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1].replace(str(path), path.name)}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(cache: Path) -> Iterator[dict[str, Any]]:
    """Rows; the most expensive one, decoding an hour, comes last. `cache` keeps the clip."""
    from PIL import Image

    cache.mkdir(parents=True, exist_ok=True)
    clip, all_ = cache / "clock.mp4", {"all": True}
    if not clip.exists():
        write(cache / "part.mp4")
        (cache / "part.mp4").rename(clip)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        pattern = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(picture(0, pattern)).save(image)
        for name, copies in COPIES.items():
            path = image if not copies else clip
            if copies > 1:
                path = Path(folder) / "long.mp4"
                repeat(clip, path, copies)
            cases = {0: ({},), 1: (all_, *CASES)}.get(copies, (*CASES, all_))
            for case in cases:
                yield {"file": name, "case": case, **measured(path, case)}


def behind(frames: int, given: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds from frames to the first token, in a process of its own."""
    command = [sys.executable, "-c", BEHIND, MODEL, str(frames), str(PER_FRAME), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"frames": frames, "patch": given, **json.loads(done.stdout)}


def model_table(work: list[dict[str, Any]]) -> str:
    """What follows the frames, with and without compression."""
    body = []
    for row in work:
        setting = ", ".join(f"{k}={v}" for k, v in row["patch"].items()) or "none"
        cells = [f"{row[part]:.2f}" for part in ("vision", "reduce", "prefill", "total")]
        body.append((str(row["frames"]), setting, *cells))
    return publishing.table(
        ("frames", "compression", "tower", "reduce", "prefill", "to the first token"), body
    )


def page(report: dict[str, Any]) -> str:
    """The page of a report."""
    rows = report["rows"]
    whole = {r["file"]: r["decode"] for r in rows if r["case"].get("all")}
    body = []
    for row in rows:
        case = row["case"]
        what = "decode all" if case.get("all") else str(case.get("frames", "–"))
        what += f", {case['size']} px" if "size" in case else ""
        decoder = case.get("decoder", "pyav") if row["file"] != "one image" else "Pillow"
        if "error" in row:
            body.append((row["file"], what, decoder, "–", "–", "–", "–", "–", "not installed"))
            continue
        parts = [row.get(p) for p in ("open", "select", "decode", "resize")]
        total = row.get("whole", row["decode"])
        share = f"{total / whole[row['file']]:.1%}" if row["file"] in whole else "–"
        cells = ["–" if p is None else f"{p:.3f}" for p in parts]
        body.append(
            (row["file"], what, decoder, str(row["taken"]), *cells, f"{total:.2f} ({share})")
        )
    chosen = [r["open"] + r["select"] for r in rows if r["file"] == "2 minutes" and "open" in r]
    share = f"{max(chosen) / whole['2 minutes']:.1%}"
    head = ("file", "frames", "decoder", "taken", "open", "select", "decode", "resize",
            "CPU s (of decoding all)")  # fmt: skip
    return (
        "# What do readers and frame policies cost, from a file to frames?\n\n"
        "`open` lists the packets of the file, `select` chooses frames from them, `resize` "
        "converts colours and scales. One thread; other work ran on the machine. Every row is the "
        "first file of its process, without the collection of Python's garbage that any first "
        "work in a process starts. "
        f"Choosing (`open` and `select`) takes at most {share} of decoding the two minutes. "
        "720p, H.264; the hour has the packets of the two minutes thirty times.\n\n"
        + publishing.table(head, body)
        + "\n\n## From the frames to the first token\n\n"
        f"{MODEL} with random weights, bfloat16, {PER_FRAME} tokens per frame, the default method; "
        "CPU seconds of one thread.\n\n" + model_table(report["work"]) + "\n"
    )


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What follows the frames, then the rows of all files as they come."""
    work, rows = [behind(frames, given) for frames, given in WORK], []
    for row in measure(args.cache):
        print(row, flush=True)
        rows.append(row)
        yield {"rows": rows, "work": work}


OPTIONS = {"cache": (Path("runs/files"), "keeps the clip")}
EXPERIMENT = Experiment("files/clock", measure_all, page, options=OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
