"""What a decode step reads and takes after an image: KV bytes, time, memory and Python calls.

    python -m benchmarks.models.decoding             # → decoding.jsonl, .md
    python -m benchmarks.models.decoding --shapes qwen2-vl-2b --tokens 65536    # replaces its rows
    python -m benchmarks.models.decoding --report    # only rebuilds the page
    python -m benchmarks.models.decoding --device cuda --out FOLDER/decoding.jsonl    # on a GPU

Decoders of real shapes with a few layers and random weights read one image, whose features are
synthetic, and then decode. Four arms share a model and take turns: no patch; the default, which
merges, with its weights in a mask of numbers and by wider heads (`tokencomp.engine.weights.carrier`
chooses one of these two; the page says which); and dropping. The head of the model, which is the
same for all, is left out. In float32 every arm runs its prompt once, whose peak is noted. The
caches are then rounded for bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.models.prefill import Piece, setup
from tokencomp.engine import later
from tokencomp.engine.weights import Carrier, carrier
from tokencomp.evaluation import timing

SHAPES = {"qwen2-vl-2b": 4, "qwen2-vl-7b": 2}  # with this number of decoder layers
TOKENS = (1024, 4096, 16384, 65536)
MOST = {"qwen2-vl-7b": 16384}
"""Visual tokens by shape, on CPUs: a prompt of four times as many allocates about 19 GiB."""
DEFAULT_UP_TO = 16384
"""Visual tokens: of more, `uniform` keeps some, since the default compares all pairs of them."""
RATIOS = (0.5, 0.75, 0.9)
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS, STEPS = 7, 4
ALONE, MASK, HEADS, DROPPED = "no patch", "merged, mask", "merged, wider heads", "dropped"
WIDER = Carrier(None, "forced by this benchmark")


@dataclass
class Arm:
    """One way to decode, with its cache.

    Attributes
    ----------
    name, ratio
    cache
        The KV cache after the prompt.
    peak
        Bytes allocated at the peak of the prompt, above those before.
    stored
        Numbers that the cache holds after the prompt.
    """

    name: str
    ratio: float
    cache: Any
    peak: int
    stored: int = field(init=False)

    def __post_init__(self) -> None:
        layers = self.cache.layers
        self.stored = sum(t.numel() for layer in layers for t in (layer.keys, layer.values))

    @contextmanager
    def carried(self, dtype: torch.dtype) -> Iterator[None]:
        """A block in which later calls add weights as the arm says."""
        mask = Carrier(torch.float32 if self.on_cpu else dtype, "forced by this benchmark")
        forced = {MASK: mask, HEADS: WIDER}.get(self.name)
        if forced is None:
            yield
            return
        with mock.patch.object(later, "carrier", lambda *_: forced):
            yield

    @property
    def on_cpu(self) -> bool:
        return bool(self.cache.layers[0].keys.device.type == "cpu")


def prompted(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, int]:
    """The cache after a prompt, and the bytes allocated at its peak."""
    body: Any = model.model
    if next(body.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cache = body(**inputs, use_cache=True).past_key_values
        return cache, torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        cache = body(**inputs, use_cache=True).past_key_values
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return cache, peak


def arms(model: nn.Module, inputs: dict[str, Any], handle: Any, reducer: str) -> list[Arm]:
    """Every arm after its prompt; both ways to add weights have the same rows."""
    with handle.disabled():
        found = [Arm(ALONE, 0.0, *prompted(model, inputs))]
    for ratio in RATIOS:
        for merge in (True, False):
            handle.set(ratio=ratio, reducer=reducer, merge=merge)
            cache, peak = prompted(model, inputs)
            found.append(Arm(MASK if merge else DROPPED, ratio, cache, peak))
            if merge:
                found.append(Arm(HEADS, ratio, copy.deepcopy(cache), peak))
    return found


def step(model: nn.Module, arm: Arm) -> Callable[[], Any]:
    """One decode step of an arm, without the head of the model."""
    body: Any = model.model
    token = torch.tensor([[7]], device=next(body.parameters()).device)
    return lambda: body(input_ids=token, past_key_values=arm.cache, use_cache=True)


def timed(model: nn.Module, every: list[Arm], dtype: torch.dtype) -> list[list[float]]:
    """Milliseconds of a step, by arm and round. Arms take turns, so that what slows the machine
    for a while slows all of them.
    """
    times: list[list[float]] = [[] for _ in every]
    for repeat in range(-1, ROUNDS):
        for arm, own in zip(every, times, strict=True):
            with arm.carried(dtype):
                call = step(model, arm)
                call()
                spent = timing.seconds(call, repeats=STEPS)
            if repeat >= 0:
                own.append(1e3 * spent)
    return times


def python_calls(call: Callable[[], Any]) -> int:
    """Number of Python functions that a call runs."""
    count = [0]

    def note(frame: Any, event: str, argument: Any) -> None:
        count[0] += event == "call"

    call()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count[0]


@torch.inference_mode()
def measure(name: str, tokens: int, device: str) -> Iterator[dict[str, Any]]:
    """One record for every arm and dtype."""
    piece = Piece(name, "image", tokens, (), (), 0, layers=SHAPES[name])
    model, inputs, visual = setup(piece, torch.float32, device)
    inputs.pop("attention_mask")  # all columns are real
    reducer = "auto" if tokens <= DEFAULT_UP_TO else "uniform"
    with tokencomp.patch(model, 0.0) as handle:
        every = arms(model, inputs, handle, reducer)
        for dtype in DTYPES:
            model.to(dtype)
            for layer in (layer for arm in every for layer in arm.cache.layers):
                layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
            times = timed(model, every, dtype)
            for arm, own in zip(every, times, strict=True):
                with arm.carried(dtype):
                    calls = python_calls(step(model, arm))
                yield {
                    "model": name, "layers": SHAPES[name], "visual_tokens": visual,
                    "dtype": str(dtype).removeprefix("torch."), "arm": arm.name,
                    "ratio": arm.ratio, "kv_bytes": arm.stored * dtype.itemsize,
                    "ms": [round(t, 3) for t in own], "python_calls": calls,
                    "peak_bytes": arm.peak if dtype == torch.float32 else None,
                }  # fmt: skip


def chosen(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The arm that `patch` runs for one token under SDPA, and why."""
    found = carrier("sdpa", device, dtype, False, False)
    return HEADS if found.numbers is None else MASK, found.reason


LEGEND = """Decoders with random weights and with as many layers of the published shape as the table
says; one image between 64 tokens of text; SDPA. "merged" is the default of
`patch`. KV MiB and ms are of these layers: for a whole model, multiply by its layers. Milliseconds
are medians of {rounds} rounds of {steps} tokens; the last column is the median of the rounds
against the unpatched model in the same round. Peak is what the prompt allocates at most, its cache
included. Python calls are functions of a step, those of the model included. {choice} A step does
not depend on which tokens are kept: at 65,536, `uniform` keeps them, because the default's choice
of 32,768 was stopped after 33 minutes on one thread, where the whole prompt takes nine. The 7B
shape would need more memory than there is. Other programs waited during the timed steps of the 2B
shape, and ran on the second core during those of the 7B shape. [All benchmark
pages](../README.md)."""


def page(records: list[dict[str, Any]]) -> str:
    """Everything as a Markdown page."""
    parts = ["# What does a decode step cost after a compressed image?"]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows_of(records):
        groups.setdefault((row["model"], row["layers"], row["dtype"]), []).append(row)
    head = (
        "visual tokens",
        "ratio",
        "",
        "KV, MiB",
        "peak, MiB",
        "Python calls",
        "ms",
        "× no patch",
    )
    for (model, layers, dtype), rows in groups.items():
        parts += [f"## {model}, {layers} layers, {dtype}", publishing.table(head, _lines(rows))]
    choice = " ".join(
        f"In {dtype}, `patch` takes the arm “{arm}” here: {reason}."
        for dtype, (arm, reason) in records[0]["chosen"].items()
    )
    legend = LEGEND.format(rounds=ROUNDS, steps=STEPS, choice=choice).replace("\n", " ")
    return "\n\n".join([*parts, legend])


def _lines(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    alone = {row["visual_tokens"]: row["ms"] for row in rows if row["arm"] == ALONE}
    for row in rows:
        pairs = zip(row["ms"], alone[row["visual_tokens"]], strict=True)
        share = statistics.median(a / b for a, b in pairs)
        peak = row["peak_bytes"]
        yield [
            f"{row['visual_tokens']:,}", f"{row['ratio']:g}" if row["ratio"] else "",
            row["arm"], f"{row['kv_bytes'] / 2**20:.1f}",
            "" if peak is None else f"{peak / 2**20:.0f}", f"{row['python_calls']:,}",
            f"{statistics.median(row['ms']):.1f}",
            "" if row["arm"] == ALONE else f"{share:.2f}",
        ]  # fmt: skip


def rows_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every record."""
    return [row for record in records for row in record["rows"]]


def measure_all(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The stored records, those of the chosen shapes and numbers of tokens replaced."""
    if args.device == "cpu":
        torch.set_num_threads(1)
    reasons = {str(d).removeprefix("torch."): chosen(args.device, d) for d in DTYPES}
    records = {(r["model"], r["tokens"]): r for r in publishing.read_lines(args.out)}
    for name, tokens in itertools.product(args.shapes, args.tokens):
        if args.device == "cpu" and tokens > MOST.get(name, tokens):
            continue
        started = time.monotonic()
        rows = [*measure(name, tokens, args.device)]
        records[name, tokens] = {"model": name, "tokens": tokens, "chosen": reasons, "rows": rows}
        print(f"{name}, {tokens}: {time.monotonic() - started:.0f} s", flush=True)
        gc.collect()
        yield sorted(records.values(), key=lambda r: (r["model"], r["tokens"]))


OPTIONS = {
    "device": "cpu",
    "shapes": ([*SHAPES], "decoders", [*SHAPES]),
    "tokens": ([*TOKENS], "visual tokens of the image"),
}
EXPERIMENT = Experiment("models/decoding", measure_all, page, rows_of, OPTIONS, lines=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    EXPERIMENT.main(__doc__)
