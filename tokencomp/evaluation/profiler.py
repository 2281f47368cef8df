"""Where time and memory go, with and without compression, interleaved in one process."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokencomp.adapters.registry import adapter_for
from tokencomp.evaluation.timing import Split, interleaved, prefill_split

DECODE_TOKENS = 16
"""Generated tokens over which the time per token is averaged."""


@dataclass(frozen=True)
class Profile:
    """One variant.

    Attributes
    ----------
    preprocess
        Seconds of the processor; None without one (random-weight shapes).
    split
        Vision tower, reducer, LLM prefill, total; medians.
    decode
        Seconds per generated token after the first.
    peak_bytes
        Peak memory of one prefill above what was held before it; None where it cannot be read.
    kv_bytes
        Bytes of keys and values in the cache after the prefill, counted on the cache itself.
    flops
        Of the decoder layers.
    per_layer
        Visual tokens seen by every layer.
    ratio
        Achieved ratio.
    tower_ratio
        Achieved ratio of the stage in the vision tower; 0 without one.
    """

    preprocess: float | None
    split: Split
    decode: float
    peak_bytes: int | None
    kv_bytes: int
    flops: int
    per_layer: list[int]
    ratio: float
    tower_ratio: float = 0.0

    def speedup(self, full: Profile) -> float:
        """LLM prefill, reducer included, against the full model."""
        return full.split.llm / self.split.llm

    def limit_reached(self, full: Profile) -> float:
        """The speed-up as a share of its arithmetic limit, FLOPs_full / FLOPs_compressed."""
        return self.speedup(full) / (full.flops / self.flops)

    def overhead(self, full: Profile) -> float:
        """Reducer time over the uncompressed prefill."""
        return self.split.reduce / full.split.prefill


def profile(
    model: Any,
    patched: Callable[[Any], AbstractContextManager[Any]],
    variants: dict[Any, tuple[dict[str, Any], float | None]],
    costs: dict[Any, Any],
    *,
    rounds: int = 5,
    progress: bool = True,
) -> dict[Any, Profile]:
    """Profile variants of one model.

    Parameters
    ----------
    patched
        Makes a context manager of a setting, which patches the model or does nothing.
    variants
        Per setting: its inputs on the device, and seconds of preprocessing.
    costs
        Per setting: `flops`, `per_layer` and `ratio`, as of `tokencomp.evaluation.cost.Cost`.
    rounds
        Timed rounds after one warm-up; every round runs every variant once.
    progress
        Show a bar, with a step for every prefill and every measurement of memory: real shapes take
        minutes on a CPU.
    """
    from tqdm.auto import tqdm

    bar = tqdm(total=len(variants) * (rounds + 2), desc="profiling", disable=not progress)

    def timed(setting: Any, inputs: dict[str, Any]) -> Callable[[], Split]:
        def run() -> Split:
            bar.set_postfix_str(f"prefill: {setting.key}")
            with patched(setting):
                split = prefill_split(model, inputs)
            bar.update()
            return split

        return run

    profiles = {}
    with bar:
        splits = interleaved({s: timed(s, i) for s, (i, _) in variants.items()}, rounds)
        for setting, (inputs, preprocess) in variants.items():
            bar.set_postfix_str(f"memory and decoding: {setting.key}")
            with patched(setting) as handle:
                peak, kv = _memory(model, inputs)
                stats = getattr(handle, "stats", None)
                decode = decode_seconds(model, inputs, DECODE_TOKENS)
            cost = costs[setting]
            profiles[setting] = Profile(
                preprocess, splits[setting], decode, peak, kv, cost.flops, cost.per_layer,
                cost.ratio, stats.tower_ratio if stats else 0.0,
            )  # fmt: skip
            bar.update()
    return profiles


@contextlib.contextmanager
def counted_rows(model: Any) -> Iterator[list[int]]:
    """Rows of the hidden states that each decoder layer gets, call by call."""
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
    device, marks = model.device, []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())

    count = tokens + 2
    with adapter_for(model).model.register_forward_pre_hook(before, with_kwargs=True):
        model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)
    steps = [b - a for a, b in itertools.pairwise(marks[1:])]
    return statistics.median(steps)


@torch.inference_mode()
def _memory(model: Any, inputs: dict[str, Any]) -> tuple[int | None, int]:
    """Peak bytes of one prefill above the bytes held before, and bytes of its KV cache."""
    with PeakMemory(model.device) as peak:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache = getattr(out, "past_key_values", None) or out["cache"]
    kv = sum(t.numel() * t.element_size() for x in cache.layers for t in (x.keys, x.values))
    return peak.bytes, kv


class PeakMemory:
    """Peak memory inside the block above what was held at its start.

    CUDA: allocated bytes. CPU on Linux: resident set size, whose high-water mark the kernel resets
    on request, after freed memory went back to the system (glibc); elsewhere `bytes` stays None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, 0
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif _reset_high_water():
            self._before = _status("VmRSS")
        else:
            self._before = -1
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._before >= 0:
            self.bytes = _status("VmHWM") - self._before


def _reset_high_water() -> bool:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except (OSError, AttributeError):
        return False


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
