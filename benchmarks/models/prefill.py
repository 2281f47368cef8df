"""LLM prefill with and without compression, real decoder shapes, random weights.

    python -m benchmarks.models.prefill                  # all parts
    python -m benchmarks.models.prefill --parts default  # the default alone, for the README
    python -m benchmarks.models.prefill --parts gpu --device cuda --out FILE
    python -m benchmarks.models.prefill --report         # only rebuilds the page

Patched and unpatched runs alternate in one process; the medians of their times are compared. The
vision tower does not run: the visual features are synthetic (see `still_video`), so these are
LLM-only numbers. The limit is arithmetic: FLOPs without / with compression. Short prompts use a
processor less well, so each ratio is also compared with the unpatched model on a text as long as
the compressed prompt ("native"). A case that is measured again replaces its record in
prefill.jsonl, and all others stay. The file and the page are written after every repeat.

The parts take 10, 6 and 4 minutes on two quiet cores. `default` is Qwen2-VL-2B with 4,096 tokens of
an image, merged as by default and dropped, and of a video; `methods` is other reducers on that
video; `memory` is a smaller model, with peaks of memory and native texts. `gpu` is 1, 4 and 16
images and a video under 2B and 7B parameters, 20 times each, and `tiny` a rehearsal of its steps.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.models import shapes
from tokencomp.evaluation import timing
from tokencomp.method import DEFAULT_REDUCER
from tokencomp.plan.options import Merging

TEXT_BEFORE, TEXT_AFTER = 16, 48
RATIOS = (0.5, 0.75, 0.9)
Method = tuple[str, Merging]
"""A reducer, and what happens to the rest; "auto", as by default, merges it on images."""
Case = tuple[str, Merging, float]
MERGED: Method = ("auto", "auto")
OTHERS: tuple[Method, ...] = (("uniform", False), ("bipartite", False), ("aim", False))


@dataclass(frozen=True)
class Piece:
    """One model and one medium: the methods and ratios, and how often each runs.

    `tokens` are visual tokens of all `images` or of the video. `extras` are peaks of memory, each
    of which takes another run, and native texts. `layers` are those of the decoder; None: all.
    """

    model: str
    kind: str
    tokens: int
    methods: tuple[Method, ...]
    ratios: tuple[float, ...]
    repeats: int
    extras: bool = True
    images: int = 1
    layers: int | None = None

    @property
    def cases(self) -> list[Case]:
        """Every method at every ratio."""
        return [(*method, ratio) for method in self.methods for ratio in self.ratios]


IMAGES, VIDEOS = (1, 4, 16), 4096
PARTS = {
    "default": (
        Piece("qwen2-vl-2b", "image", 4096, (MERGED, ("auto", False)), RATIOS, 3, False),
        Piece("qwen2-vl-2b", "video", 4096, (MERGED,), RATIOS, 3, False),
    ),
    "methods": (Piece("qwen2-vl-2b", "video", 4096, OTHERS, RATIOS, 2, False),),
    "memory": (Piece("llava-onevision-0.5b", "video", 4096, (MERGED, *OTHERS), RATIOS, 2),),
    "gpu": tuple(
        Piece(model, kind, tokens, (MERGED, ("auto", False), *OTHERS), RATIOS, 20, images=count)
        for model in ("qwen2-vl-2b", "qwen2-vl-7b")
        for kind, tokens, count in (*(("image", 576 * n, n) for n in IMAGES), ("video", VIDEOS, 1))
    ),
    "tiny": (Piece("tiny", "image", 128, (MERGED, *OTHERS), (0.5,), 1, images=2),),
}


def setup(piece: Piece, dtype: torch.dtype, device: str) -> tuple[nn.Module, dict[str, Any], int]:
    """Model, the inputs of one prompt with images or a video, and its visual tokens.

    There are about as many as asked for: whole frames of 196 or 256 tokens, or square images.
    """
    torch.manual_seed(0)
    name, kind, count = piece.model, piece.kind, piece.images
    size = {"layers": piece.layers, "vision_layers": 1}
    model, _ = shapes.build(name, tokens=1, dtype=dtype, device=device, **size)
    config: Any = model.config
    hidden, tokens = config.text_config.hidden_size, piece.tokens // count
    if name.startswith("llava"):
        base = still_video(round(tokens / 196), 196, hidden)
        base, grid = torch.cat([base, base[-1:]])[None], {}  # the last token ends the video
    else:
        frames, side = (1, round(tokens**0.5)) if kind == "image" else (round(tokens / 256), 16)
        base = still_video(frames, side * side, hidden)
        grid = {f"{kind}_grid_thw": torch.tensor([[frames, 2 * side, 2 * side]] * count)}
    every = [base, *(still_video(frames, side * side, hidden) for _ in range(count - 1))]
    n = base.shape[-2]
    placeholder = config.image_token_id if kind == "image" else config.video_token_id
    media = [9, *([placeholder] * n + [9]) * count][1:-1]  # a token of text between two images
    ids = torch.tensor([[9] * TEXT_BEFORE + media + [11] * TEXT_AFTER])
    features = [one.to(device, dtype) for one in every]
    pooled = features[0] if name.startswith("llava") else tuple(features)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {kind: BaseModelOutputWithPooling(pooler_output=pooled)},
        **grid,
    }
    if grid:
        inputs["mm_token_type_ids"] = (1 if kind == "image" else 2) * (ids == placeholder).int()
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return model, moved, n * count


def still_video(frames: int, places: int, hidden: int) -> Tensor:
    """Features of one scene in every frame, each with noise of its own; (frames · places, hidden).

    Real video repeats itself, and reducers that compare tokens must not be timed on rows that have
    nothing in common. Neighbouring tokens are alike (cosine 2/3), so are frames (cosine of a place
    with itself 0.99); the scale is that of embeddings.
    """
    scene = torch.randn(places, hidden)
    scene = (scene + scene.roll(1, 0) + scene.roll(2, 0)) / 3**0.5
    return 0.035 * (scene + 0.1 * torch.randn(frames, places, hidden)).flatten(0, 1)


def text_only(tokens: int, device: torch.device) -> dict[str, Any]:
    """A prompt without visual input, as long as a compressed one."""
    ids = torch.full((1, tokens + TEXT_BEFORE + TEXT_AFTER), 9, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prefill(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Seconds of one prefill, launches and host reads included."""
    with torch.inference_mode():
        return timing.seconds(lambda: model(**inputs, use_cache=True, logits_to_keep=1))


def peak_of(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes allocated at the peak of one prefill, above those allocated before it."""
    if inputs["input_ids"].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prefill(model, inputs)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        prefill(model, inputs)
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def measure(
    piece: Piece, dtype: torch.dtype, device: str = "cpu"
) -> Iterator[list[dict[str, Any]]]:
    """After every repeat, one record per case: the full model runs, then each case in turn.

    On a GPU a round comes first that does not count: Triton compiles kernels at their first call.
    """
    model, inputs, visual = setup(piece, dtype, device)
    cases = piece.cases
    peak_full, full = peak_of(model, inputs) if piece.extras else None, []
    native: dict[float, list[float]] = {ratio: [] for ratio in piece.ratios}
    seconds = {case: [] for case in cases}
    reduce: dict[Any, list[float]] = {case: [] for case in cases}
    peaks, stats = dict.fromkeys(cases), {}
    with tokencomp.patch(model, 0.0) as handle:
        for reducer, merge, ratio in cases if device != "cpu" else ():
            handle.set(ratio=ratio, reducer=reducer, merge=merge)
            prefill(model, inputs)
        for repeat in range(piece.repeats):
            with handle.disabled():
                full.append(prefill(model, inputs))
                for ratio in piece.ratios if piece.extras else ():
                    short = text_only(round(visual * (1 - ratio)), inputs["input_ids"].device)
                    native[ratio].append(prefill(model, short))
            for case in cases:
                reducer, merge, ratio = case
                handle.set(ratio=ratio, reducer=reducer, merge=merge)
                if repeat == 0 and piece.extras:
                    peaks[case] = peak_of(model, inputs)
                seconds[case].append(prefill(model, inputs))
                stats[case] = handle.stats
                reduce[case].append(handle.stats.reduce_seconds)
            yield [
                {
                    **record(piece, case, dtype, stats[case]),
                    **speed(stats[case], full, seconds[case], native[case[2]], reduce[case]),
                    "peak_bytes_full": peak_full,
                    "peak_bytes_compressed": peaks[case],
                }
                for case in cases
            ]


def method_of(record: Mapping[str, Any]) -> str:
    """The reducer, and what differs from its default."""
    dropped = record["reducer"] == DEFAULT_REDUCER and record["merge"] is False
    return record["reducer"] + (" merge=False" if dropped else "")


def record(piece: Piece, case: Case, dtype: torch.dtype, stats: Any) -> dict[str, Any]:
    """What a case is, and what it leaves of the KV cache."""
    return {
        "model": piece.model,
        "kind": piece.kind,
        "tokens": piece.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "visual_tokens": stats.tokens_before[0],
        "text_tokens": TEXT_BEFORE + TEXT_AFTER,
        "reducer": case[0],
        "merge": case[1],
        "ratio": case[2],
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
        "fraction_of_native": round(median(native) / median(compressed), 3) if native else None,
        "reduce_overhead": round(median(reduce) / base, 4),
    }


LEGEND = """Random weights in {dtypes}, without the vision tower: median time of the unpatched
prefill divided by that of the patched one, in brackets from the slowest to the fastest of all
pairs of runs. Fewer FLOPs: the same for the decoder's arithmetic. Time may gain more, because a
long prompt costs more time per FLOP than a short one: a text of the compressed length, without
any patch, takes {native} of the compressed time where it was measured (`of_native`). Reducer:
its own time, scoring included, as a share of the full prefill. Peak memory and KV cache: shares
of the unpatched run's, at the highest ratio. [All cases](../README.md#tables-as-csv)."""


def page(records: list[dict[str, Any]]) -> str:
    """The page of all records, by method and ratio."""
    dtypes = " or ".join(dict.fromkeys(r["dtype"] for r in records))
    shares = [r["fraction_of_native"] for r in records if r["fraction_of_native"]]
    native = f"{min(shares):.0%} to {max(shares):.0%}" if shares else "a share (not measured)"
    parts = [
        "# How much faster is the LLM prefill?",
        overview(records),
        LEGEND.format(dtypes=dtypes, native=native).replace("\n", " "),
    ]
    return "\n\n".join(parts) + "\n"


def overview(records: list[dict[str, Any]]) -> str:
    """One row per model, media and method."""
    found: dict[tuple[Any, ...], dict[float, dict[str, Any]]] = {}
    for r in records:
        case = (r["model"], r["kind"], str(r["visual_tokens"]), method_of(r))
        found.setdefault(case, {})[r["ratio"]] = r
    ratios = sorted({r["ratio"] for r in records})
    rows = []
    for case, by_ratio in found.items():
        last = by_ratio[max(by_ratio)]
        shares = (last["kv_bytes_compressed"] / last["kv_bytes_full"], peak(last))
        cells = [_speed(by_ratio[q]) if q in by_ratio else "–" for q in ratios]
        own = max(r["reduce_overhead"] for r in by_ratio.values())
        rest = [f"{last['flop_limit']:.1f} ×", f"{100 * own:.1f} %"]
        rest += ["–" if v is None else f"{100 * v:.0f} %" for v in shares]
        rows.append([*case, *cells, *rest])
    head = ["model", "media", "visual tokens", "method", *(f"ratio {q:g}" for q in ratios)]
    limit = f"fewer FLOPs, {max(ratios):g}"
    return publishing.table([*head, limit, "reducer, at most", "KV cache", "peak memory"], rows)


def _speed(r: dict[str, Any]) -> str:
    """The speed-up of a case with its range."""
    return f"{r['speedup']:.1f} × ({slowest(r):.1f} to {fastest(r):.1f})"


def slowest(r: dict[str, Any]) -> float:
    """The smallest ratio of a full run and a compressed one."""
    return float(min(r["seconds_full"]) / max(r["seconds_compressed"]))


def fastest(r: dict[str, Any]) -> float:
    return float(max(r["seconds_full"]) / min(r["seconds_compressed"]))


def peak(r: dict[str, Any]) -> float | None:
    """Peak memory as a share of the unpatched run's, where it was measured."""
    full = r["peak_bytes_full"]
    return float(r["peak_bytes_compressed"] / full) if full else None


def rows_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the CSV file."""
    return [
        {
            "model": r["model"],
            "media": r["kind"],
            "visual_tokens": r["visual_tokens"],
            "method": method_of(r),
            "ratio": r["ratio"],
            "runs": len(r["seconds_compressed"]),
            "speedup": r["speedup"],
            "speedup_low": slowest(r),
            "speedup_high": fastest(r),
            "flop_limit": r["flop_limit"],
            "of_native": r["fraction_of_native"],
            "reducer_of_prefill": r["reduce_overhead"],
            "peak_memory": peak(r),
            "kv_cache": r["kv_bytes_compressed"] / r["kv_bytes_full"],
            "commit": publishing.version(r["environment"]["commit"]),
            "date": r["environment"]["date"][:10],
        }
        for r in records
    ]


def fastest_dtype() -> torch.dtype:
    """float32 or bfloat16, whichever multiplies faster: CPUs differ by 3× either way."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 1536).to(dtype), torch.randn(1536, 8960).to(dtype)
        runs = [timing.seconds(lambda a=a, b=b: a @ b) for _ in range(6)]
        seconds[dtype] = min(runs[1:])
    return min(seconds, key=lambda dtype: seconds[dtype])


def key(r: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a record."""
    return r["model"], r["tokens"], r["kind"], method_of(r), r["ratio"]


def measure_parts(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The stored records, those of the chosen parts replaced after every repeat."""
    dtype = getattr(torch, args.dtype, None)
    if dtype is None:
        dtype = fastest_dtype() if args.device == "cpu" else torch.bfloat16
    records = {key(r): r for r in publishing.read_lines(args.out)}
    for piece in itertools.chain.from_iterable(PARTS[name] for name in args.parts):
        own: list[dict[str, Any]] = []
        for own in measure(piece, dtype, args.device):
            records |= {key(r): r for r in own}
            yield list(records.values())
        print("\n".join(overview(own).splitlines()[2:]), flush=True)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident memory of this process: {usage / 2**20:.1f} GiB")


OPTIONS = {
    "parts": (["default", "methods", "memory"], "", PARTS),
    "device": "cpu",
    "dtype": ("auto", "", ("auto", "float32", "bfloat16")),
}
EXPERIMENT = Experiment("models/prefill", measure_parts, page, rows_of, OPTIONS, lines=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
