"""Videos longer than the model was trained on: what window extension and compression each buy.

    python benchmarks/accuracy/long_video.py                                # M-RoPE positions
    python benchmarks/accuracy/long_video.py --model tiny-llava-onevision   # 1-D positions

writes long_video-MODEL.json (tables, how they were made), .jsonl (every answer) and .md. ShapesQA
videos of 16 frames, the longest in training, and of 32 and 64. Every method keeps as many tokens as
16 frames have. "extended": under `extend_visual_context`, whose window is the tokens of 16 frames.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from PIL import Image
from run import tower_once
from trained import HERE, Book, ask, parser

from tokencomp import extend_visual_context
from tokencomp.adapters.base import adapter_for
from tokencomp.cli import one_message
from tokencomp.evaluation.baselines import EqualTokens
from tokencomp.evaluation.settings import DOWNSCALE, FEWER_FRAMES
from tokencomp.inputs.questions import shapesqa
from tokencomp.shapesqa.items import SIZE, items
from tokencomp.training.measure import FULL, Measurement, Way

SETS = {"16 frames": 16, "32 frames": 32, "64 frames": 64}
TRAINED = 16
FAMILIES = ("needle", "video_existence")
TOKENS_AT_ONCE = 12288  # visual tokens of a batch
PLAIN = "pool stride=1"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "condiv": ("condiv", {}),
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
    counter = EqualTokens(processor, list(adapter_for(model).placeholder_ids()), DOWNSCALE)
    return counter.tokens([Image.new("RGB", SIZE)] * frames)


def extended_names(measured: Measurement, ways: list[Way]) -> list[Way]:
    """Give all answers and ways names of their own."""

    def renamed(key: str) -> str:
        name, _, ratio = key.rpartition("@")
        return f"{name}{EXTENDED}@{ratio}"

    for r in measured.records:
        r |= {part: {renamed(k): v for k, v in r[part].items()} for part in ("told", "correct")}
    for numbers in (measured.achieved, measured.tokens):
        renewed = {renamed(k): v for k, v in numbers.items()}
        numbers.clear()
        numbers |= renewed
    return [Way(f"{w.name}{EXTENDED}", w.ratio, w.reducer) for w in (Way(FULL), *ways)]


def measure(
    model: Any, processor: Any, frames: int, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and records of all methods on videos of one length, without and with extension."""
    asked = items(args.split, args.items // len(FAMILIES), FAMILIES, frames=frames)
    source = shapesqa(asked, HERE / "results" / "media" / "long" / str(frames))
    ratio, tokens = 1 - TRAINED / frames, tokens_of(model, processor, frames)
    methods = [Way(name, ratio, *how) for name, how in METHODS.items()] if ratio else []
    how: dict[str, Any] = {"batch": max(1, TOKENS_AT_ONCE // tokens), "frames": frames}
    with tower_once(model):
        measured, ways = ask(
            {"": model}, processor, source, methods, f"{frames} frames",
            smaller=(DOWNSCALE, FEWER_FRAMES), **how,
        )  # fmt: skip
        if ratio:
            window = tokens_of(model, processor, TRAINED)
            with extend_visual_context(model, tokens, window=window):
                more, extended = ask(
                    {"": model}, processor, source, methods, f"{frames} frames{EXTENDED}",
                    smaller=(), **how,
                )  # fmt: skip
            ways += extended_names(more, extended)
            for mine, other in zip(measured.records, more.records, strict=True):
                mine |= {part: mine[part] | other[part] for part in ("told", "correct")}
            measured.achieved |= more.achieved
            measured.tokens |= more.tokens
    return measured.table(ways), measured.records


def main(args: argparse.Namespace) -> None:
    from tokencomp.inputs.loading import load_model

    torch.set_num_threads(args.threads)
    book = Book(f"long_video-{args.model}", args, RIVALS)
    if book.sets:
        model, processor = load_model(args.model, device=args.device)
    for name in book.sets:
        book.add(name, *measure(model, processor, SETS[name], args), {})
        book.write(NOTES)
    book.write(NOTES)


NOTES = (
    "Ratios are those that leave the tokens of 16 frames. p against random: against `random` "
    "without extension. `fewer_frames`: the full model on evenly chosen frames. The embedded "
    "models were trained by the commands on their cards. Of extension there is more to gain with "
    "one position per token, where four times the frames are four times the positions; with M-RoPE "
    "a video takes as many positions as it has frame pairs, and four times as many are not far "
    "from those of training. Pooling: plain (`stride=1`) and progressive as published (`pool`)."
)

if __name__ == "__main__":
    arguments = parser(__doc__, SETS)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.set_defaults(items=100)
    with one_message():
        main(arguments.parse_args())
