"""LLM prefill with and without compression, real decoder shapes, random weights.

    python -m benchmarks.models.prefill             # all cases → prefill.jsonl, prefill.md
    python -m benchmarks.models.prefill --models llava-onevision-0.5b --tokens 2048
    python -m benchmarks.models.prefill --quick     # few cases → prefill_quick.jsonl, .md
    python -m benchmarks.models.prefill --report    # only rebuilds the page

Patched and unpatched runs alternate in one process; the medians of their times are compared. The
vision tower does not run: the visual features are synthetic (see `still_video`), so these are
LLM-only numbers. The limit is arithmetic: FLOPs without / with compression. Short prompts use a
processor less well, so each ratio is also compared with the unpatched model on a text as long as
the compressed prompt ("native"). Records of other models and lengths stay in the file, so the
benchmark can be run in pieces. The file and the page are written after every repeat.

`--quick` takes less than ten minutes on two quiet cores: Qwen2-VL-2B at 4,096 tokens with merge,
auto and aim, and aim at 0.5 on the 0.5B shape. It leaves out the peaks of memory, each of which
takes another run.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import tokencomp
from benchmarks import publishing
from benchmarks.models import shapes
from benchmarks.publishing import environment, provenance, read_lines
from tokencomp.pages import measured
from tokencomp.storage import write_lines

FOLDER = Path(__file__).parent
TEXT_BEFORE, TEXT_AFTER = 16, 48
REDUCERS = ("uniform", "merge", "auto", "aim")
RATIOS = (0.5, 0.75, 0.9)
Case = tuple[str, float]


@dataclass(frozen=True)
class Piece:
    """One model at one length: the reducers and ratios, and how often each runs."""

    model: str
    tokens: int
    cases: tuple[Case, ...]
    repeats: int
    peaks: bool = True  # of memory; each takes another run


QUICK = (
    Piece("llava-onevision-0.5b", 2048, (("aim", 0.5),), 5, False),
    Piece("llava-onevision-0.5b", 4096, (("aim", 0.5),), 5, False),
    Piece("qwen2-vl-2b", 4096, tuple(itertools.product(REDUCERS[1:], RATIOS)), 2, False),
)


MODELS = ("llava-onevision-0.5b", "qwen2-vl-2b")


def setup(name: str, tokens: int, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """Model and the inputs of one prompt with a video of about `tokens` visual tokens."""
    torch.manual_seed(0)
    model, _ = shapes.build(name, tokens=1, vision_layers=1, dtype=dtype)
    config: Any = model.config
    hidden = config.text_config.hidden_size
    if name.startswith("llava"):
        base = still_video(round(tokens / 196), 196, hidden)
        base, grid = torch.cat([base, base[-1:]])[None], {}  # the last token ends the video
    else:
        frames = round(tokens / 256)
        base = still_video(frames, 256, hidden)
        grid = {"video_grid_thw": torch.tensor([[frames, 32, 32]])}
    n = base.shape[-2]
    video = config.video_token_id
    ids = torch.tensor([[9] * TEXT_BEFORE + [video] * n + [11] * TEXT_AFTER])
    pooled = base.to(dtype) if name.startswith("llava") else (base.to(dtype),)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"video": BaseModelOutputWithPooling(pooler_output=pooled)},
        **grid,
    }
    if grid:
        inputs["mm_token_type_ids"] = 2 * (ids == video).int()
    return model, inputs


def still_video(frames: int, places: int, hidden: int) -> Tensor:
    """Features of one scene in every frame, each with noise of its own; (frames · places, hidden).

    Real video repeats itself, and reducers that compare tokens must not be timed on rows that have
    nothing in common. Neighbouring tokens are alike (cosine 2/3), so are frames (cosine of a place
    with itself 0.99); the scale is that of embeddings.
    """
    scene = torch.randn(places, hidden)
    scene = (scene + scene.roll(1, 0) + scene.roll(2, 0)) / 3**0.5
    return 0.035 * (scene + 0.1 * torch.randn(frames, places, hidden)).flatten(0, 1)


def text_only(tokens: int) -> dict[str, Any]:
    """A prompt without visual input, as long as a compressed one."""
    ids = torch.full((1, tokens + TEXT_BEFORE + TEXT_AFTER), 9)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prefill(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Seconds of one prefill."""
    start = time.perf_counter()
    with torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def peak_of(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes allocated at the peak of one prefill, above those allocated before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        prefill(model, inputs)
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def measure(piece: Piece, dtype: torch.dtype) -> Iterator[list[dict[str, Any]]]:
    """After every repeat, one record per case: the full model runs, then each case in turn."""
    model, inputs = setup(piece.model, piece.tokens, dtype)
    cases, ratios = piece.cases, list(dict.fromkeys(ratio for _, ratio in piece.cases))
    peak_full, full = peak_of(model, inputs) if piece.peaks else None, []
    visual = int((inputs["input_ids"] == model.config.video_token_id).sum())
    native: dict[float, list[float]] = {ratio: [] for ratio in ratios}
    seconds = {case: [] for case in cases}
    reduce: dict[Any, list[float]] = {case: [] for case in cases}
    peaks, stats = dict.fromkeys(cases), {}
    with tokencomp.patch(model, 0.0) as handle:
        for repeat in range(piece.repeats):
            with handle.disabled():
                full.append(prefill(model, inputs))
                for ratio in ratios:
                    short = text_only(round(visual * (1 - ratio)))
                    native[ratio].append(prefill(model, short))
            for reducer, ratio in cases:
                handle.set(ratio=ratio, reducer=reducer)
                if repeat == 0 and piece.peaks:
                    peaks[reducer, ratio] = peak_of(model, inputs)
                seconds[reducer, ratio].append(prefill(model, inputs))
                stats[reducer, ratio] = handle.stats
                reduce[reducer, ratio].append(handle.stats.reduce_seconds)
            yield [
                {
                    **record(piece, case, dtype, stats[case]),
                    **speed(stats[case], full, seconds[case], native[case[1]], reduce[case]),
                    "peak_bytes_full": peak_full,
                    "peak_bytes_compressed": peaks[case],
                }
                for case in cases
            ]


def record(piece: Piece, case: Case, dtype: torch.dtype, stats: Any) -> dict[str, Any]:
    """What a case is, and what it leaves of the KV cache."""
    return {
        "model": piece.model,
        "tokens": piece.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "visual_tokens": stats.tokens_before[0],
        "text_tokens": TEXT_BEFORE + TEXT_AFTER,
        "reducer": case[0],
        "ratio": case[1],
        "achieved_ratio": round(stats.ratio, 4),
        "kv_bytes_full": stats.kv_bytes_before,
        "kv_bytes_compressed": stats.kv_bytes_after,
    }


def speed(
    stats: Any,
    full: list[float],
    compressed: list[float],
    native: list[float],
    reduce: list[float],
) -> dict[str, Any]:
    """The seconds of the runs so far, and what their medians say."""
    median, base = statistics.median, statistics.median(full)
    limit, speedup = stats.flops_before / stats.flops_after, base / median(compressed)
    return {
        "seconds_full": list(full),
        "seconds_compressed": list(compressed),
        "seconds_native": list(native),
        "seconds_reduce": list(reduce),
        "speedup": round(speedup, 3),
        "flop_limit": round(limit, 3),
        "fraction_of_limit": round(speedup / limit, 3),
        "fraction_of_native": round(median(native) / median(compressed), 3),
        "reduce_overhead": round(median(reduce) / base, 4),
    }


LEGEND = """Time of the LLM prefill with compression, compared with the same model without it, with
random weights and without the vision tower. Speed-up is the ratio of the median times; the brackets
give its range between the fastest and the slowest pair of runs. The FLOP limit is the FLOPs without
compression divided by those with it. "Of native" compares with the unpatched model on a text as
long as the compressed prompt, because a processor works less efficiently on short prompts. "Reduce"
is the reducer's own time, scoring included. Peak memory and KV cache are shares of the unpatched
run's. [All benchmark pages](../README.md)."""


def page(records: list[dict[str, Any]]) -> str:
    """Everything as a Markdown page."""
    sources = dict.fromkeys(f"- {r['dtype']}: {provenance(r['environment'])}" for r in records)
    parts = [
        "# LLM prefill",
        LEGEND.replace("\n", " "),
        table(records),
        "Made by:",
        "\n".join(sources),
    ]
    return "\n\n".join(parts) + "\n"


def table(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    columns = (
        "model", "visual tokens", "reducer", "ratio", "runs", "prefill speed-up", "FLOP limit",
        "of limit", "of native", "reduce / full prefill", "peak memory", "KV cache",
    )  # fmt: skip
    rows = []
    for r in records:
        peak = "–"
        if r["peak_bytes_full"]:
            peak = f"{100 * r['peak_bytes_compressed'] / r['peak_bytes_full']:.0f} %"
        kv = r["kv_bytes_compressed"] / r["kv_bytes_full"]
        full, less = r["seconds_full"], r["seconds_compressed"]
        spread = f"({min(full) / max(less):.1f}–{max(full) / min(less):.1f})"
        shares = [f"{100 * r[f'fraction_of_{name}']:.0f} %" for name in ("limit", "native")]
        rows.append(
            [
                *(str(r[name]) for name in ("model", "visual_tokens", "reducer", "ratio")),
                *(str(len(less)), f"{r['speedup']:.2f}× {spread}", f"{r['flop_limit']:.2f}×"),
                *(*shares, f"{100 * r['reduce_overhead']:.1f} %", peak, f"{100 * kv:.0f} %"),
            ]
        )
    return publishing.table(columns, rows)


def fastest_dtype() -> torch.dtype:
    """float32 or bfloat16, whichever multiplies faster: CPUs differ by 3× either way."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 1536).to(dtype), torch.randn(1536, 8960).to(dtype)
        runs = [timed(lambda a=a, b=b: a @ b) for _ in range(6)]
        seconds[dtype] = min(runs[1:])
    return min(seconds, key=lambda dtype: seconds[dtype])


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def pieces(args: argparse.Namespace) -> Iterator[Piece]:
    """What the command line requests."""
    cases = tuple(itertools.product(REDUCERS, args.ratios))
    for name, tokens in itertools.product(args.models, args.tokens):
        yield Piece(name, tokens, cases, args.repeats)


def key(piece: Piece) -> tuple[str, int]:
    """What identifies the records of a piece."""
    return piece.model, piece.tokens


def publish(out: Path, records: list[dict[str, Any]]) -> None:
    """Write the page of the results and, of the full ones, the part that the package shows."""
    out.with_suffix(".md").write_text(page(records))
    if out == FOLDER / "prefill.jsonl":
        measured.keep(records)


def main() -> None:
    parser = publishing.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the few cases of `QUICK`")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    args = parser.parse_args()
    args.out = args.out or FOLDER / ("prefill_quick.jsonl" if args.quick else "prefill.jsonl")
    if args.report:
        publish(args.out, read_lines(args.out))
        return
    facts = publishing.published_from(args.out, args.allow_dirty)
    dtype = fastest_dtype() if args.dtype == "auto" else getattr(torch, args.dtype)
    for piece in QUICK if args.quick else pieces(args):
        run_facts = {**environment(), **facts}
        others = [r for r in read_lines(args.out) if (r["model"], r["tokens"]) != key(piece)]
        own: list[dict[str, Any]] = []
        for repeat in measure(piece, dtype):
            own = [{**r, "environment": run_facts} for r in repeat]
            records = [*others, *own]
            records.sort(key=lambda r: (list(MODELS).index(r["model"]), r["tokens"]))
            write_lines(args.out, records)
            publish(args.out, records)
        print("\n".join(table(own).splitlines()[2:]), flush=True)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident memory of this process: {usage / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
