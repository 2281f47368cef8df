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
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.files.material import BACKGROUNDS, RATE, X264
from tokencomp.evaluation.metrics import difference, mcnemar
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


COUNTS, RATIO = (8, 16, 32), 0.75
CHOSEN = f"32 at {RATIO:g}"
RULES = {
    "even": "evenly spaced",
    "stream": "`stream:N`",
    "key frames": "key frames only",
    "aks": "`scorer:aks:N`",
    "focus": "`scorer:focus:N`",
    "known": "the answer known",
}
TRAINED = {
    "tiny-qwen3-vl": ", which was trained on clips of at most 16 frames and 8 seconds",
    "tiny-qwen3-vl-hard": ", which was trained on clips of at most 64 frames and four minutes",
}
Row = dict[str, Any]


def page(report: Row) -> str:
    """The page of a report."""
    rows = report["rows"]
    budgets = [str(count) for count in COUNTS] + [CHOSEN]
    body = [
        [text, *(f"{np.mean([r['right'][f'{rule} {n}'] for r in rows]):.1%}" for n in budgets)]
        for rule, text in RULES.items()
    ]
    body.append(["blind guess", *([f"{_blind(rows):.1%}"] * len(budgets))])
    head = ["rule", *(f"{n} frames" for n in COUNTS), f"32 frames, ratio {RATIO:g}"]
    return "\n\n".join(
        [
            "# Which rule for choosing frames answers most questions about long clips?",
            publishing.table(head, body),
            _intro(report),
        ]
    ) + "\n"  # fmt: skip


def _intro(report: Row) -> str:
    rows = report["rows"]
    families = list(dict.fromkeys(r["family"] for r in rows))
    questions, ratio = len({r["id"] for r in rows}), np.mean([r["ratio"] for r in rows])
    return (
        f"Right answers of {report['model']} to {questions} {report['split']} questions of "
        f"{', '.join(families)}, each about three clips with another background: {len(rows)} clips "
        "of two minutes, 24 frames per second, H.264 with a key frame every two seconds. An event "
        "lasts half a second; what `direction` asks about lasts the whole clip. AKS scores one "
        "frame per second with embeddings of the model, FOCUS three of every 16 seconds and "
        "then one per second of half the clip. *The answer known* takes the frames that show the "
        f"evidence: what is missing there is the model's{TRAINED.get(report['model'], '')}. Ratio "
        f"{RATIO:g} (achieved: {ratio:.3f}) with the default method leaves 32 frames the visual "
        "tokens of 8 in the decoder; the vision tower sees all 32. "
        f"{report['cpu'] / 60:.0f} CPU minutes, so few questions: only large differences are "
        f"certain. [By background and family, coverage and paired tests]({publishing.TABLES})."
    )


def records(report: Row) -> list[Row]:
    """The rows of the CSV file: accuracy by group, coverage, and tests against another rule.

    `shows_all` and `shows_some`: clips with short evidence of which the chosen frames show all or
    some. The three backgrounds of a question are not independent: intervals are somewhat narrow.
    """
    rows, found = report["rows"], []
    families = dict.fromkeys(r["family"] for r in rows)
    groups = {b: _where("background", b) for b in BACKGROUNDS}
    groups |= {f: _where("family", f) for f in families}
    against = dict(_pairs())
    for rule, count in itertools.product(RULES, (*COUNTS, CHOSEN)):
        key = f"{rule} {count}"
        row: Row = {"frames": count, "rule": RULES[rule]}
        row["all"] = float(np.mean([r["right"][key] for r in rows]))
        for name, inside in groups.items():
            row[name] = float(np.mean([r["right"][key] for r in rows if inside(r)]))
        seen = [r["shown"][key] for r in rows if key in r["shown"] and r["shown"][key][1]]
        row |= {"short_evidence": len(seen), "shows_all": sum(a == b for a, b in seen)}
        row["shows_some"] = sum(a > 0 for a, _ in seen)
        if key in against:
            a, b = ([float(r["right"][k]) for r in rows] for k in (key, against[key]))
            test, gap = mcnemar(a, b), difference(a, b)
            row |= {"against": against[key], "points": gap.value, "low": gap.low, "high": gap.high}
            row |= {"won": test.wins, "lost": test.losses, "p": test.p}
        found.append(row)
    return found


def _where(name: str, value: str) -> Callable[[Row], bool]:
    return lambda row: bool(row[name] == value)


def _blind(rows: Sequence[Row]) -> float:
    """Share of right answers of the best guess by family that sees nothing."""
    right = 0.0
    for family in {r["family"] for r in rows}:
        asked = [r for r in rows if r["family"] == family]
        answers = [r["answer"] for r in asked]
        right += max(
            max(answers.count(a) for a in set(answers)), sum(1 / len(r["options"]) for r in asked)
        )
    return right / len(rows)


def _pairs() -> list[tuple[str, str]]:
    """What is compared with what."""
    chosen = ("stream", "key frames", "aks", "focus")
    rules = [(f"{r} {c}", f"even {c}") for c in COUNTS for r in chosen]
    return [*rules, *((f"{r} {CHOSEN}", f"{r} 8") for r in ("even", "stream", "aks", "focus"))]


OPTIONS = {
    "model": "tiny-qwen3-vl-hard",
    "split": ("test", "", ("validation", "test")),
    "items": (20, "questions of a family"),
    "minutes": (40.0, "CPU time after which it stops"),
}
EXPERIMENT = Experiment("files/accuracy", measure, page, records, OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
