"""Time and memory with and without compression, interleaved in one process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.cost import prefill_costs
from tokencomp.evaluation.patches import patched
from tokencomp.evaluation.settings import Setting
from tokencomp.evaluation.timing import Split, interleaved, prefill_split
from tokencomp.inputs.prompts import prompt_lengths

DECODE_TOKENS = 16
"""Generated tokens over which the time per token is averaged."""
ANSWERS = (16, 256)
"""Tokens of a short and of a long answer, whose times are put together from the parts."""


def profile(
    model: Any,
    variants: dict[Setting, tuple[dict[str, Any], float | None]],
    *,
    rounds: int = 5,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Profile variants of one model on one prompt; the first is the full model.

    `variants` has per setting its inputs on the device, and seconds of preprocessing, if any. After
    a warm-up every round runs every variant once.

    Returns a row per variant, ready for JSON; seconds are medians. `peak_bytes` is the peak memory
    of one prefill above what was held before it, None where it cannot be read; `kv_bytes` are
    counted on the cache itself. `speedup` is for the LLM prefill with the reducer,
    `limit_reached` its share of what FLOPs allow, `reduce_overhead` the reducer's time over the
    uncompressed prefill, and `total_speedup` is for the whole call. `answers` has, by the number of
    tokens, the seconds of a whole answer from preprocessing to its last token, and how many times
    as fast it is: later tokens take as long as the first ones.
    """
    from tqdm.auto import tqdm

    rows: list[dict[str, Any]] = []
    inputs_of = {setting: inputs for setting, (inputs, _) in variants.items()}
    full = next(iter(inputs_of.values()))
    before = [visual for _, visual in prompt_lengths(model, full)]
    with tqdm(total=len(variants) * (rounds + 2), desc="profiling", disable=not progress) as bar:
        splits = time_prefills(model, inputs_of, bar, rounds)
        for setting, (inputs, preprocess) in variants.items():
            bar.set_postfix_str(f"memory and decoding: {setting.key}")
            with patched(model, setting) as handle:
                peak, kv = _memory(model, inputs)
                stats = handle.stats if handle is not None else None
                decode = decode_seconds(model, inputs, DECODE_TOKENS)
            (cost,) = prefill_costs(model, inputs, stats, before)
            row = {
                "reducer": setting.name,
                "ratio": setting.written_ratio,
                "options": setting.written_options,
                "achieved_ratio": cost.ratio,
                "tower_ratio": stats.tower_ratio if stats else 0.0,
                "preprocess_s": preprocess,
                **{f"{part}_s": seconds for part, seconds in vars(splits[setting]).items()},
                "decode_s_per_token": decode,
                "peak_bytes": peak,
                "kv_bytes": kv,
                "flops": cost.flops,
                "tokens_per_layer": cost.per_layer,
            }
            rows.append({**row, **_gains(row, rows[0] if rows else row)})
            bar.update()
    return rows


def _gains(row: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """How a variant compares with the full model."""
    before, after = (one["prefill_s"] + one["reduce_s"] for one in (full, row))
    speedup, flop_limit = before / after, full["flops"] / row["flops"]
    return {
        "speedup": speedup,
        "flop_limit": flop_limit,
        "limit_reached": speedup / flop_limit,
        "reduce_overhead": row["reduce_s"] / full["prefill_s"],
        "total_speedup": full["total_s"] / row["total_s"],
        "answers": [
            {"tokens": n, "seconds": answer(row, n), "speedup": answer(full, n) / answer(row, n)}
            for n in ANSWERS
        ],
    }


def answer(row: dict[str, Any], tokens: int) -> float:
    """Seconds of an answer: preprocessing, prefill with its first token, and one step per other."""
    prefill = (row["preprocess_s"] or 0.0) + row["total_s"]
    return float(prefill + (tokens - 1) * row["decode_s_per_token"])


def time_prefills(
    model: Any,
    inputs_of: Mapping[Setting, dict[str, Any]],
    bar: Any,
    rounds: int = 5,
    budget: float | None = None,
) -> dict[Setting, Split]:
    """Median split of one prefill per setting (see `interleaved`); `bar` counts them."""

    def run(setting: Setting) -> Split:
        bar.set_postfix_str(f"prefill: {setting.key}")
        with patched(model, setting):
            split = prefill_split(model, inputs_of[setting])
        bar.update()
        return split

    return interleaved({s: functools.partial(run, s) for s in inputs_of}, rounds, budget)


@contextlib.contextmanager
def counted_rows(model: Any) -> Iterator[list[int]]:
    """Rows of hidden states that each decoder layer gets, by call."""
    rows: list[int] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    with contextlib.ExitStack() as hooks:
        for layer in adapter_for(model).layers:
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield rows


@torch.inference_mode()
def decode_seconds(model: Any, inputs: dict[str, Any], tokens: int) -> float:
    """Median seconds of the decoder's one-token steps in a greedy generation."""
    from torch.utils.benchmark import timer

    marks: list[float] = []

    count = tokens + 2
    with adapter_for(model).model.register_forward_pre_hook(lambda *_: marks.append(timer())):
        model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)
    steps = [b - a for a, b in itertools.pairwise(marks[1:])]
    return statistics.median(steps)


@torch.inference_mode()
def _memory(model: Any, inputs: dict[str, Any]) -> tuple[int | None, int]:
    """Peak bytes of one prefill above the bytes held before, and bytes of its KV cache."""
    before = _held(model.device)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    peak = None if before is None else _peak(model.device) - before
    cache = getattr(out, "past_key_values", None) or out["cache"]
    kv = sum(t.numel() * t.element_size() for x in cache.layers for t in (x.keys, x.values))
    return peak, kv


def _held(device: torch.device) -> int | None:
    """Bytes that are held now, from which the peak counts anew; None where it cannot be read.

    CUDA: allocated bytes. CPU on Linux: resident set size, whose high-water mark is reset after
    freed memory went back to the system (glibc).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    """Most bytes that were held since `_held`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of a line of the status, which has kilobytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024
