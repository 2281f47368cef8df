"""Videos longer than the model was trained on: the effect of window extension and of compression.

    python -m benchmarks.accuracy.studies.long_video                                # M-RoPE
    python -m benchmarks.accuracy.studies.long_video --model tiny-llava-onevision   # 1-D positions

writes long_video-MODEL.json (tables, provenance, packed answers) and .md. ShapesQA videos of 16
frames, the longest in training, and of 32 and 64. Every method keeps as many tokens as 16 frames
have. "extended": under `extend_visual_context`, whose window is the tokens of 16 frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from benchmarks.accuracy.run import tower_once
from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.trained import Found, Study, measure, named
from tokencomp import extend_visual_context
from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import DOWNSCALE, FEWER_FRAMES, FULL, Setting
from tokencomp.inputs.loading import load_model
from tokencomp.training.measure import Measurement
from tokencomp.zoo.shapesqa.difficulty import SIZE
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items

SETS = {"16 frames": 16, "32 frames": 32, "64 frames": 64}
TRAINED = 16
FAMILIES = ("needle", "video_existence")
TOKENS_AT_ONCE = 12288  # visual tokens of a batch
PLAIN = "pool stride=1"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "condiv": ("auto", {}),
    "pool": ("pool", {}),
    PLAIN: ("pool", {"stride": 1.0}),
    "random": ("random", {}),
}
OTHERS = ("random", "uniform", "pool", PLAIN, DOWNSCALE, FEWER_FRAMES)
EXTENDED = ", extended"
RIVALS = {
    "condiv": OTHERS,
    "pool": ("random", "uniform", PLAIN, FEWER_FRAMES),
    PLAIN: ("random", "uniform", FEWER_FRAMES),
    f"condiv{EXTENDED}": ("condiv", *(f"{n}{EXTENDED}" for n in ("random", "uniform", "pool"))),
    f"pool{EXTENDED}": ("pool",),
    f"{FULL}{EXTENDED}": (FULL,),
}


def tokens_of(model: Any, processor: Any, frames: int) -> int:
    """Visual tokens of a video of that many frames."""
    counter = EqualTokens(processor, list(adapter_for(model).placeholders), DOWNSCALE)
    return counter.tokens([Image.new("RGB", SIZE)] * frames)


def _extended(key: str) -> str:
    name, _, ratio = key.rpartition("@")
    return f"{name}{EXTENDED}@{ratio}"


def join(measured: Measurement, more: Measurement, ways: list[Setting]) -> list[Setting]:
    """Add answers under window extension to those without, under names of their own.

    Returns
    -------
    list of Setting
        The extended methods, the full model first.
    """
    measured.runs |= {_extended(key): run for key, run in more.runs.items()}
    return [named(f"{w.name}{EXTENDED}", w.ratio, w.reducer) for w in (named(FULL), *ways)]


def measure_length(
    model: Any, processor: Any, frames: int, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, EvalRun]]:
    """Rows and runs of all methods on videos of one length, without and with extension."""
    questions = items(args.split, args.items // len(FAMILIES), FAMILIES, frames=frames)
    source = shapesqa(questions, ACCURACY / "results" / "media" / "long" / str(frames))
    ratio, tokens = 1 - TRAINED / frames, tokens_of(model, processor, frames)
    methods = [named(name, ratio, *spec) for name, spec in METHODS.items()] if ratio else []
    options: dict[str, Any] = {"batch": max(1, TOKENS_AT_ONCE // tokens), "frames": frames}
    with tower_once(model):
        measured, ways = measure(
            {"": model}, processor, source, methods, f"{frames} frames",
            smaller=(DOWNSCALE, FEWER_FRAMES), **options,
        )  # fmt: skip
        if ratio:
            window = tokens_of(model, processor, TRAINED)
            with extend_visual_context(model, tokens, window=window):
                more, extended = measure(
                    {"": model}, processor, source, methods, f"{frames} frames{EXTENDED}",
                    smaller=(), **options,
                )  # fmt: skip
            ways += join(measured, more, extended)
    return measured.table(ways), measured.runs


def measured(args: argparse.Namespace) -> Iterator[Found]:
    """All methods on videos of every length."""
    torch.set_num_threads(args.threads)
    model, processor = load_model(args.model, device=args.device)
    for name in args.sets:
        yield name, *measure_length(model, processor, SETS[name], args), {}


NOTES = (
    "Every ratio leaves as many tokens as 16 frames have, the longest video in training. "
    f"`{FEWER_FRAMES}` is the full model on evenly spaced frames. Extension can gain more with one "
    "position per token than with M-RoPE, where a video takes one position per frame pair. Pooling "
    "is plain (`stride=1`) or progressive as published (`pool`)."
)
OPTIONS = {"threads": torch.get_num_threads(), "items": 100}
STUDY = Study("long_video-{model}", SETS, measured, RIVALS, NOTES, OPTIONS)


if __name__ == "__main__":
    STUDY.main(__doc__)
