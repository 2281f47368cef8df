"""Peak memory of the prefill of a long video, with and without `prefill_chunk_size`.

    python benchmarks/models/chunked_prefill.py        # → chunked_prefill.md

A small Qwen2-VL with random weights reads one video of 4096 visual tokens. Every case runs in a
process of its own; its peak is the largest resident set of the process during `generate` minus the
one before. The widest call is the largest number of columns that any decoder layer sees: an exact
count.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import tokencomp
from tokencomp.evaluation.environment import environment, provenance

PAGE = Path(__file__).with_suffix(".md")
GRID = (16, 32, 32)  # patches of the video; four make a token
RATIO = 0.5
CASES = [(0.0, None), (RATIO, None), (RATIO, 512), (RATIO, 128)]


def build() -> Any:
    """A Qwen2-VL whose MLP dominates the memory of a prefill, as in models of real size."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    config = transformers.Qwen2VLConfig(
        text_config={
            "hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
            "rope_parameters": rope, "max_position_embeddings": 32768,
        },
        vision_config={
            "depth": 1, "embed_dim": 32, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


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
    model, inputs, widest = build(), prompt(), 0

    def note(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal widest
        widest = max(widest, (args[0] if args else kwargs["hidden_states"]).shape[1])

    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    short = {k: v[:, :3] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with tokencomp.patch(model, ratio, reducer="uniform"):
        model.generate(**short, **options)  # what is loaded on first use is not counted
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model.generate(**inputs, **options, prefill_chunk_size=chunk)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"widest": widest, "peak_mib": (after - before) / 1024}


def main() -> None:
    """Run every case and write the page."""
    rows = []
    for ratio, chunk in CASES:
        command = [sys.executable, __file__, json.dumps([ratio, chunk])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(ratio, chunk, found, flush=True)
        row = f"| {ratio} | {chunk or 'none'} | {found['widest']} | {found['peak_mib']:.0f} |"
        rows.append(row)
    tokens = GRID[0] * GRID[1] * GRID[2] // 4
    PAGE.write_text(
        "# Chunked prefill of a long video\n\n"
        f"One video of {tokens} visual tokens, a small Qwen2-VL with random weights, on the CPU. "
        "Widest call: the most columns that any decoder layer sees (an exact count). Peak: growth "
        "of the largest resident set of the process during the prefill, the vision tower "
        "included, which runs once and is not chunked.\n\n"
        "| ratio | prefill_chunk_size | widest call | peak, MiB |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nRegenerate: `python benchmarks/models/{Path(__file__).name}`. "
        + f"{provenance(environment())}\n"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main()
