"""Peak memory of the prefill of a long video, with and without `prefill_chunk_size`.

    python -m benchmarks.models.chunked_prefill             # → chunked_prefill.json, .md
    python -m benchmarks.models.chunked_prefill --report    # only rebuilds the page

A small Qwen2-VL with random weights reads one video of 4096 visual tokens. Every case runs in a
process of its own; its peak is the largest resident set of the process during `generate` minus the
one before. The widest call is the largest number of columns that any decoder layer sees: an exact
count.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.models.shapes import qwen2_vl
from tokencomp.evaluation.profiler import counted_rows

ROOT = Path(__file__).parents[2]
GRID = (16, 32, 32)  # patches of the video; four make a token
RATIO = 0.5
CASES = [(0.0, None), (RATIO, None), (RATIO, 512), (RATIO, 128)]


def build() -> Any:
    """A Qwen2-VL whose MLP dominates the memory of a prefill, as in models of real size."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, range(500, 504), strict=True))
    tower = {"mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return qwen2_vl(256, 4096, 4, 4, 2, 512, sections=(8, 12, 12), ids=ids, **tower)


def prompt() -> dict[str, torch.Tensor]:
    """One video between two short texts."""
    patches = GRID[0] * GRID[1] * GRID[2]
    ids = torch.tensor([[1, 2, 3, 502, *[501] * (patches // 4), 503, 4, 5, 6]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 501).int() * 2,
        "pixel_values_videos": torch.randn(patches, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([GRID]),
    }


def measure(ratio: float, chunk: int | None) -> dict[str, Any]:
    """Widest call and peak memory of one case, in this process."""
    torch.set_num_threads(1)
    model, inputs = build(), prompt()
    short = {k: v[:, :3] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with counted_rows(model) as rows, tokencomp.patch(model, ratio, reducer="uniform"):
        model.generate(**short, **options)  # what is loaded on first use is not counted
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model.generate(**inputs, **options, prefill_chunk_size=chunk)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"widest": max(rows), "peak_mib": (after - before) / 1024}


def measure_apart(ratio: float, chunk: int | None) -> dict[str, Any]:
    """One case in a process of its own: a peak counts from the start of a process."""
    module = "benchmarks.models.chunked_prefill"
    case = f"json.dumps(measure({ratio}, {chunk}))"
    code = f"import json; from {module} import measure; print({case})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return {"ratio": ratio, "chunk": chunk, **json.loads(out.splitlines()[-1])}


LEGEND = """One video of {tokens} visual tokens, read by a small Qwen2-VL with random weights on the
CPU. Widest call is the largest number of columns that any decoder layer sees in one call, an exact
count. Peak is the growth of the largest resident set of the process during the prefill. It includes
the vision tower, which runs once and is not chunked. [All benchmark pages](../README.md)."""


def page(report: dict[str, Any]) -> str:
    """Everything as a Markdown page."""
    head = ("ratio", "prefill_chunk_size", "widest call", "peak, MiB")
    rows = [
        [str(r["ratio"]), str(r["chunk"] or "none"), str(r["widest"]), f"{r['peak_mib']:.0f}"]
        for r in report["rows"]
    ]
    parts = [
        "# How much memory does `prefill_chunk_size` save on a long video?",
        publishing.table(head, rows),
        LEGEND.format(tokens=report["visual_tokens"]).replace("\n", " "),
    ]
    return "\n\n".join(parts)


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cases, one after the other."""
    rows = []
    for ratio, chunk in CASES:
        rows.append(measure_apart(ratio, chunk))
        print(rows[-1], flush=True)
    yield {"visual_tokens": GRID[0] * GRID[1] * GRID[2] // 4, "rows": rows}


EXPERIMENT = Experiment("models/chunked_prefill", measure_all, page)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
