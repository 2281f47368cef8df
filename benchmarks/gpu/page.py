"""The page of the GPU benchmark, from its records."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.publishing import provenance, table

Record = dict[str, Any]

HEAD = """# Prefill on a GPU

Command: `python -m benchmarks.gpu.prefill` (one GPU, about half an hour by an estimate).
[All benchmark pages](../README.md)."""

PREFILL = """### Whole prefills

Median time of the LLM prefill between two CUDA events, with random weights and without the vision
tower. The overhead is the time of the patched prefill without that of the unpatched model on a text
as long as the compressed prompt, as a share of the full prefill: scoring, selection, gathering, and
all launches and host reads of the patch. At ratio 0 it is compared with the full prefill itself."""

KERNELS = """### Kernels

Share of the roofline time (data-sheet rates) that a kernel reaches."""

BACKENDS = """### FlashAttention-2 against SDPA

Largest difference of the last logits between the two backends, with the patch and without it. Both
round to half precision in different places, so the second column is the scale of the first."""


def page(records: list[Record]) -> str:
    """Everything as Markdown."""
    parts = [HEAD]
    for card in dict.fromkeys(r["card"] for r in records):
        own = [r for r in records if r["card"] == card]
        parts.append(f"## {card}\n\nMade by: {provenance(own[0]['environment'])}")
        for title, kind, show in SECTIONS:
            chosen = [r for r in own if r["step"].startswith(kind)]
            if chosen:
                parts += [title, show(chosen)]
    return "\n\n".join(parts) + "\n"


def _parts(record: Record) -> list[str]:
    """Decoder and prompt of a step."""
    return record["step"].split(", ")[1:]


def prefills(records: list[Record]) -> str:
    """One line per decoder, prompt, reducer and ratio."""
    head = (
        "decoder", "prompt", "reducer", "ratio", "runs", "full, ms", "patched, ms", "speed-up",
        "FLOP limit", "overhead",
    )  # fmt: skip
    rows = [
        [
            *_parts(r),
            r["reducer"],
            f"{r['ratio']:g}",
            str(len(r["seconds_patched"])),
            f"{1e3 * statistics.median(r['seconds_full']):.2f}",
            f"{1e3 * statistics.median(r['seconds_patched']):.2f}",
            f"{r['speedup']:.2f}×",
            f"{r['flop_limit']:.2f}×",
            f"{100 * r['overhead']:.1f} %",
        ]
        for r in records
    ]
    return table(head, rows)


def kernels(records: list[Record]) -> str:
    """One line per case."""
    head = ("op", "case", "version", "median, µs", "share of the roofline")
    rows = []
    for r in records:
        share = f"{100 * r['roofline_share']:.0f} %" if "roofline_share" in r else "card not listed"
        rows.append([r["op"], r["case"], r["provider"], f"{1e6 * r['median_s']:.1f}", share])
    return table(head, rows)


def backends(records: list[Record]) -> str:
    """One line per decoder, prompt and reducer."""
    missing = dict.fromkeys(r["left_out"] for r in records if "left_out" in r)
    if missing:
        return f"Left out: {'; '.join(missing)}."
    head = (
        "decoder", "prompt", "reducer", "backends", "with the patch", "without it",
        "same next token", "same tokens kept",
    )  # fmt: skip
    rows = [
        [
            *_parts(r),
            r["reducer"],
            " and ".join(r["backends"]),
            f"{r['largest_difference']:.2e}",
            f"{r['largest_difference_unpatched']:.2e}",
            "yes" if r["same_next_token"] else "no",
            "yes" if r["same_tokens_kept"] else "no",
        ]
        for r in records
    ]
    return table(head, rows)


SECTIONS: tuple[tuple[str, str, Callable[[list[Record]], str]], ...] = (
    (PREFILL, "prefill", prefills),
    (KERNELS, "kernel", kernels),
    (BACKENDS, "backends", backends),
)
