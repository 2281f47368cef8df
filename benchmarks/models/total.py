"""What a whole answer costs: the prefill and n decode steps, by the length of the prompt.

    python -m benchmarks.models.total             # → total.json, .md
    python -m benchmarks.models.total --report    # only rebuilds the page

A decoder of a real shape with a few layers and random weights reads one image or clip, whose
features are synthetic, and writes. The default at every ratio and no patch take turns, on one
thread, whose processor time counts. The vision tower, which costs the same in all of them, is left
out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.models.prefill import Piece, setup
from tokencomp.evaluation import timing

SHAPE, LAYERS = "qwen2-vl-2b", 4
TOKENS = {"image": (256, 1024, 4096)}
RATIOS = (0.5, 0.75, 0.9)
ROUNDS, STEPS = 3, 8
LENGTHS = (1, 32, 128, 512, 2048)
"""Tokens of an answer; the prefill gives the first one."""
SAVED = 0.1
"""Share of the total that a ratio has to save in the last column."""


def timed(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds of a prefill and of a decode step after it."""
    body: Any = model.model
    started = time.process_time()
    cache = body(**inputs, use_cache=True).past_key_values
    prefill = time.process_time() - started
    token = torch.tensor([[7]])
    body(input_ids=token, past_key_values=cache, use_cache=True)
    step = partial(body, input_ids=token, past_key_values=cache, use_cache=True)
    return 1e3 * prefill, 1e3 * timing.seconds(step, time.process_time, STEPS)


@torch.inference_mode()
def measure(kind: str, tokens: int) -> list[dict[str, Any]]:
    """One record for no patch, ratio 0, and for every ratio."""
    model, inputs, visual = setup(
        Piece(SHAPE, kind, tokens, (), (), 0, layers=LAYERS), torch.float32, "cpu"
    )
    inputs.pop("attention_mask")  # all columns are real
    times: dict[float, list[tuple[float, float]]] = {ratio: [] for ratio in (0.0, *RATIOS)}
    with tokencomp.patch(model, 0.0) as handle:
        for repeat in range(-1, ROUNDS):
            for ratio, pairs in times.items():
                handle.set(ratio=ratio)
                found = timed(model, inputs)
                if repeat >= 0:
                    pairs.append(found)
    return [
        {
            "kind": kind, "visual_tokens": visual, "ratio": ratio,
            "prefill_ms": [round(a, 3) for a, _ in pairs],
            "step_ms": [round(b, 3) for _, b in pairs],
        }
        for ratio, pairs in times.items()
    ]  # fmt: skip


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for kind, sizes in TOKENS.items():
        for tokens in sizes:
            rows += measure(kind, tokens)
            gc.collect()
            yield {"rows": rows}


def total(row: dict[str, Any], length: int) -> float:
    """Milliseconds of an answer of `length` tokens, from the medians."""
    steps = (length - 1) * statistics.median(row["step_ms"])
    return float(statistics.median(row["prefill_ms"]) + steps)


def longest(row: dict[str, Any], alone: dict[str, Any]) -> float:
    """The longest answer for which at least `SAVED` of the total is saved.

    0 if no answer saves as much, infinite if every one does. Both totals are straight lines over
    the length, so that the saving crosses `SAVED` once at most.
    """
    first = (1 - SAVED) * total(alone, 1) - total(row, 1)
    each = (1 - SAVED) * statistics.median(alone["step_ms"]) - statistics.median(row["step_ms"])
    if first < 0:
        return 0.0
    return float("inf") if each >= 0 else 1 + first / -each


def entries(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per kind, size and ratio, with shares of the total of no patch."""
    alone = {(r["kind"], r["visual_tokens"]): r for r in report["rows"] if not r["ratio"]}
    out = []
    for row in report["rows"]:
        plain = alone[row["kind"], row["visual_tokens"]]
        shares = {f"total_{n}": total(row, n) / total(plain, n) for n in LENGTHS}
        out.append(
            {
                "kind": row["kind"], "visual_tokens": row["visual_tokens"], "ratio": row["ratio"],
                "prefill_ms": statistics.median(row["prefill_ms"]),
                "step_ms": statistics.median(row["step_ms"]), **shares,
                "longest": longest(row, plain),
            }
        )  # fmt: skip
    return out


LEGEND = """{layers} of the 28 layers of {shape}'s decoder, random weights, float32, processor time
of one thread; 64 tokens of text; without the vision tower and the head of the model. Prefill and
step: medians of {rounds} rounds, the reduction included; a step is one of the {steps} after the
prompt. The other columns are calculated from them: prefill and n − 1 steps, divided by the same
without a patch. Rows that the answer itself adds to the cache are the same in both and are left
out. Last column: the longest answer for which a tenth of the total is saved. [What a step
reads](decoding.md), [prefills of all layers](prefill.md), [what long answers
keep](../long/README.md)."""


def page(report: dict[str, Any]) -> str:
    """Everything as a Markdown page."""
    head = ["visual tokens", "ratio", "prefill, ms", "step, ms"]
    head += [f"{n:,} token{'s' * (n > 1)}" for n in LENGTHS] + ["saves a tenth up to"]
    parts = ["# From which length does compression pay, the whole answer counted?"]
    for kind in TOKENS:
        lines = [_line(entry) for entry in entries(report) if entry["kind"] == kind]
        if lines:
            parts += [f"## {kind.capitalize()}s", publishing.table(head, lines)]
    legend = LEGEND.format(layers=LAYERS, shape=SHAPE, rounds=ROUNDS, steps=STEPS)
    return "\n\n".join([*parts, legend.replace("\n", " ")])


def _line(entry: dict[str, Any]) -> list[str]:
    alone = not entry["ratio"]
    limit = entry["longest"]
    words = {0.0: "no answer", float("inf"): "every answer"}.get(limit, f"{limit:,.0f} tokens")
    return [
        f"{entry['visual_tokens']:,}",
        "no patch" if alone else f"{entry['ratio']:g}",
        f"{entry['prefill_ms']:,.0f}",
        f"{entry['step_ms']:.1f}",
        *("" if alone else f"{entry[f'total_{n}']:.2f}" for n in LENGTHS),
        "" if alone else words,
    ]


EXPERIMENT = Experiment("models/total", measure_all, page, entries)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    EXPERIMENT.main(__doc__)
