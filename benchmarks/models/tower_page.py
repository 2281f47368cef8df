"""The page of `benchmarks.models.tower`: its cases, and tables of its records."""

from __future__ import annotations

from typing import Any

from benchmarks import publishing
from benchmarks.models.tower_alone import compared

RATIO, TOWER_RATIO = 0.75, 0.6
CASES = {
    "qwen-tower": "tower of Qwen2-VL-2B and 7B, one image of 1,024 tokens",
    "siglip-tower": "SigLIP-so400m, 384 px, one frame of LLaVA-OneVision",
    "qwen-image": "Qwen2-VL-2B, one image of 1,024 tokens",
    "qwen-video": "Qwen2-VL-2B, a video of 32 frames",
}
LABELS = {
    "full": "full",
    "decoder": f"ratio {RATIO}",
    "both": f"ratio {RATIO}, tower ratio {TOWER_RATIO}",
}
PREAMBLE = f"""# The vision tower with fewer patches

Real shapes with random weights. Patches leave before block 0 of the tower, chosen by k-center on
pixels; the decoder keeps {1 - RATIO:g} of the visual tokens with the default reducer. Times of one
CPU thread are processor time, those of several are elapsed time. The speed-up of a whole model is
the median over rounds, each of which runs all variants, with the smallest and the largest of them
in brackets. `python -m benchmarks.models.tower --headline` measures whole models at full depth, and
`--towers` towers alone. The FLOP limit is the FLOPs of blocks and projector without the stage
divided by those with it. "1/4 of the blocks": of tower and decoder alike, at their full width, so
that the shares stay and what happens once per prompt weighs four times as much.
[All benchmark pages](../README.md).
"""


def page(records: list[dict[str, Any]]) -> str:
    """The page of the benchmark."""
    towers = compared(records)
    heads = ["tower", "tower ratio", "full", "with the stage", "speed-up", "FLOP limit"]
    heads += ["of limit", "choosing / full tower", "rounds", "machine"]
    lines = [PREAMBLE]
    rows = [
        [
            CASES[r["case"]], f"{r['tower_ratio']:g}", f"{r['full_s']:.2f} s",
            f"{r['seconds']:.2f} s", f"{r['speedup']:.2f}×", f"{r['flop_limit']:.2f}×",
            f"{r['speedup'] / r['flop_limit']:.0%}", f"{r['choose_s'] / r['full_s']:.1%}",
            str(r["rounds"]), r["machine"],
        ]
        for r in towers
    ]  # fmt: skip
    lines += ["## Towers alone", "", publishing.table(heads, rows), ""] if towers else []
    lines += ["## Time to the first token", ""]
    names = ("preprocess", "tower", "choose", "rest", "reduce", "prefill", "total")
    parts_of = ("pictures to pixels", "tower, projector", "choosing", "embeddings, head", "reduce")
    lines += [
        f"| model and prompt | | {' | '.join(parts_of)} | prefill | total | speed-up | rounds "
        "| machine |",
        "|" + "---|" * 12,
    ]
    for r in (r for r in records if "parts" in r):
        for key, parts in r["parts"].items():
            cells = " | ".join(f"{parts[name]:.2f} s" for name in names)
            label = f"{CASES[r['case']]} ({r['tokens']} tokens)" if key == "full" else ""
            pairs = r.get("pairs", {}).get(key, ())
            spread = f" [{min(pairs):.2f}, {max(pairs):.2f}]" if len(pairs) > 1 else ""
            speedup = f"{r['speedup'][key]:.2f}×{spread}"
            tail = f"{speedup} | {r['rounds']} | {r['machine']}"
            lines.append(f"| {label} | {LABELS[key]} | {cells} | {tail} |")
    made = dict.fromkeys(f"- {publishing.provenance(r['provenance'])}" for r in records)
    return "\n".join([*lines, "", "Made by:", "", *made, ""])
