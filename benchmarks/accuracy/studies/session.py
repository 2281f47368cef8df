"""What a session remembers of a stream, against showing the last frames again for every question.

    python -m benchmarks.accuracy.studies.session            # session.json and session.md
    python -m benchmarks.accuracy.studies.session --report   # only the page

Streams of 48 frames, two at a time. Something flashes within the first 8, and the same question
about it is asked again and again, as the stream goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from tokencomp import zoo
from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.profiler import counted_rows
from tokencomp.handle import ATTRIBUTE
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.inputs.video import Video, with_frames
from tokencomp.zoo.shapesqa.items import Item, item

MODEL, SPLIT, FAMILY = "tiny-qwen3-vl-hard", "test", "needle"
STREAMS, FRAMES, EARLY, CHUNK = 24, 48, 8, 2
ASKED = (8, 16, 24, 32, 48)
BUDGET = 302  # rows of a prompt with the last 8 frames, uncompressed
ANSWER = 4


@dataclass(frozen=True)
class Way:
    """One way to answer questions about a stream.

    `last`: so many frames are shown again for every question; 0: a session. `policy`: of the
    session; None: without a budget.
    """

    name: str
    ratio: float = 0.0
    last: int = 0
    policy: str | None = None


WAYS = (
    Way("the last 8 frames again", last=8),
    Way("the last 22 frames again, ratio 0.75", 0.75, last=22),
    Way("session, all rows"),
    Way("session, oldest rows go", policy="oldest"),
    Way("session, redundant rows go", policy="redundant"),
    Way("session, ratio 0.75, oldest rows go", 0.75, policy="oldest"),
    Way("session, ratio 0.75, redundant rows go", 0.75, policy="redundant"),
)


def streams() -> Iterator[Item]:
    """Items whose evidence lies within the first frames."""
    for index in itertools.count():
        found = item(SPLIT, FAMILY, index, frames=FRAMES)
        if max(found.evidence.frames) < EARLY:
            yield found


def answers(way: Way, model: Any, processor: Any, stream: Item) -> Iterator[dict[str, Any]]:
    """What is answered after `ASKED` frames, and the rows that are held for it."""
    video = stream.video()
    session = None
    if not way.last:
        budget = BUDGET if way.policy else None
        session = tokencomp.Session(model, processor, budget, way.policy or "oldest")
    for stop in range(CHUNK, FRAMES + 1, CHUNK):
        if session is not None:
            session.append(part(video, stop - CHUNK, stop))
        if stop not in ASKED:
            continue
        if session is not None:
            answer, rows = session.ask(stream.question, max_new_tokens=ANSWER), session.rows
        else:
            answer, rows = again(way, model, processor, part(video, stop - way.last, stop), stream)
        yield {"frames": stop, "right": answer.lower() == stream.answer.lower(), "rows": rows}
    if session is not None:
        session.close()


def again(way: Way, model: Any, processor: Any, frames: Video, stream: Item) -> tuple[str, int]:
    """The answer to a prompt with these frames, and its rows."""
    inputs = build_inputs(processor, [[frames]], [stream.question])
    rows = inputs["input_ids"].shape[1]
    answer = generate(model, processor, inputs, ANSWER)[0]
    handle = model.__dict__.get(ATTRIBUTE)
    if handle is not None:
        stats = handle.stats
        rows += stats.tokens_after[0][0] - stats.tokens_before[0]
    return answer, rows


def part(video: Video, start: int, stop: int) -> Video:
    """Frames `start … stop - 1`, at their times."""
    start = max(0, start)
    return with_frames(video, video[start:stop], range(start, stop))


def measure(way: Way, model: Any, processor: Any, found: list[Item]) -> dict[str, Any]:
    """Right answers and rows by age of the stream, and the tokens that the decoder ran."""
    patched = (
        tokencomp.patch(model, way.ratio, reducer="kcenter")
        if way.ratio
        else contextlib.nullcontext()
    )
    with patched, counted_rows(model) as counted:
        records = [list(answers(way, model, processor, stream)) for stream in found]
    points = list(zip(*records, strict=True))
    return {
        "way": way.name,
        "frames": [own[0]["frames"] for own in points],
        "right": [sum(r["right"] for r in own) for own in points],
        "rows": [max(r["rows"] for r in own) for own in points],
        "run": sum(counted[:: len(adapter_for(model).layers)]) // len(found),
    }


def bytes_per_row(model: Any, processor: Any) -> int:
    """Of a cache, measured."""
    with tokencomp.Session(model, processor) as session:
        session.say("one")
        layers = session.cache.layers
        held = [t for layer in layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in held) // session.rows


def page(report: dict[str, Any]) -> str:
    """Everything as a Markdown page."""
    asked, n = report["rows"][0]["frames"], report["streams"]
    head = [f"{frames}" for frames in asked]
    accuracy = [
        [row["way"], *(f"{right / n:.2f}" for right in row["right"])] for row in report["rows"]
    ]
    size = report["bytes_per_row"]
    cost = [
        [
            row["way"],
            *(f"{rows:,}" for rows in row["rows"]),
            f"{max(row['rows']) * size / 2**20:.1f} MiB",
            f"{row['run']:,}",
        ]
        for row in report["rows"]
    ]
    margin = 1.96 * math.sqrt(0.25 / n)
    case = (
        f"{n} streams of {FRAMES} frames (ShapesQA, {SPLIT} split, {report['model']}), appended "
        f"{CHUNK} frames at a time. Something flashes within the first {EARLY} frames, other "
        "objects are visible throughout. The question about it is asked after "
        f"{', '.join(head)} frames; a session is asked without a trace. Sessions with a budget "
        f"hold at most {BUDGET} rows of the cache between calls, as many as a prompt with the last "
        f"{EARLY} frames has."
    )
    return "\n\n".join(
        [
            "# What does a session remember of a stream?",
            case,
            "## Accuracy by length of the stream",
            publishing.table(["way", *(f"{h} frames" for h in head)], accuracy, right=len(head)),
            f"With {n} streams an accuracy near one half is certain to ± {margin:.2f} (95 %).",
            "## Rows, memory and work",
            "Rows: the most that any stream holds when the question is asked, for sessions without "
            "the question. Memory: keys and values of the most rows, in float32. Tokens: what the "
            "first decoder layer runs per stream, for frames, questions and answers.",
            publishing.table(
                ["way", *(f"rows, {h}" for h in head), "memory", "tokens"], cost,
                right=len(head) + 2,
            ),
            "[How to use a session](../../docs/agents.md#sessions). "
            "[All benchmark pages](../README.md).",
        ]
    ) + "\n"  # fmt: skip


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All ways, one after the other."""
    torch.set_num_threads(1)
    model, processor = zoo.load(MODEL)
    found, rows = list(itertools.islice(streams(), STREAMS)), []
    for way in WAYS:
        rows.append(measure(way, model, processor, found))
        print(json.dumps(rows[-1]), flush=True)
    size = bytes_per_row(model, processor)
    yield {"model": MODEL, "streams": STREAMS, "bytes_per_row": size, "rows": rows}


EXPERIMENT = Experiment("accuracy/session", measure_all, page)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
