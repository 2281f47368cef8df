"""The page of `benchmarks.models.tower`: its cases, and what its records say."""

from __future__ import annotations

from typing import Any

from benchmarks import publishing
from benchmarks.models.tower_alone import compared
from benchmarks.models.tower_parts import STEPS

MIB = 2**20
RATIO = 0.75
SHARES = {"recommended": 0.4, "both": 0.6}
"""Tower ratios: what the frontier recommends for images, and more."""
CASES = {
    "qwen-tower": "tower of Qwen2-VL-2B and 7B, one image of 1,024 tokens",
    "siglip-tower": "SigLIP-so400m, 384 px, one frame of LLaVA-OneVision",
    "qwen-image": "Qwen2-VL-2B, one image of 1,024 tokens",
    "qwen-video": "Qwen2-VL-2B, a video of 32 frames",
}
LABELS = {
    "full": "full",
    "decoder": f"ratio {RATIO}",
    **{key: f"ratio {RATIO}, tower ratio {share}" for key, share in SHARES.items()},
}
BELOW = f"""Time to the first token of real shapes with random weights. Patches are dropped before
block 0 of the tower, chosen by k-center on pixels; the decoder keeps {1 - RATIO:g} of the visual
tokens with the default method, which merges the rest of what the tower has computed. The KV cache
holds a merged token once.
Per later token: median of {STEPS} single-token steps, each of which reads all weights of the
decoder and the KV cache, the smaller part at this length. Peak memory: what is allocated during the
prefill at most, tower included and weights not; measured in a run of its own, and only with a part
of the blocks. Times of one CPU thread are processor time, of several elapsed time; brackets: the
smallest and largest speed-up of a round. "1/4 of the blocks": of tower and decoder, at their full
width. –: not measured. [Every part, and towers alone](../README.md#tables-as-csv). `python -m
benchmarks.models.tower`, at full depth with `--headline`, towers alone with `--towers`."""
PARTS = ("preprocess", "tower", "choose", "rest", "reduce", "prefill", "total")


def page(records: list[dict[str, Any]]) -> str:
    """The page of the benchmark."""
    rows = []
    for r in (r for r in records if "parts" in r):
        for key, parts in r["parts"].items():
            pairs = r.get("pairs", {}).get(key, ())
            spread = f" [{min(pairs):.2f}, {max(pairs):.2f}]" if len(pairs) > 1 else ""
            times = [f"{parts[part]:.2f} s" for part in ("tower", "prefill", "total")]
            facts = [f"{r['speedup'][key]:.2f}×{spread}", *after(parts)]
            facts += [str(r["rounds"]), r["machine"]]
            rows.append([f"{CASES[r['case']]}", LABELS[key], *times, *facts])
    head = ["prompt", "", "tower", "prefill", "total", "speed-up"]
    head += ["KV cache", "peak memory", "per later token", "rounds", "machine"]
    title = "# How much sooner is the first token, and what happens to memory and decoding?"
    return "\n\n".join([title, publishing.table(head, rows), BELOW.replace("\n", " ")])


def after(parts: dict[str, float]) -> list[str]:
    """KV cache, peak memory and time per later token, where they were measured."""
    cells = {"kv_bytes": (MIB, ".1f", "MiB"), "peak_bytes": (MIB, ".0f", "MiB")}
    cells["later_token"] = (1e-3, ".0f", "ms")
    return [
        f"{parts[name] / unit:{digits}} {word}" if name in parts else "–"
        for name, (unit, digits, word) in cells.items()
    ]


def mib(size: float | None) -> float | None:
    return None if size is None else size / MIB


def rows_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the CSV file, in seconds and MiB: whole models by part, and towers alone."""
    rows = [
        {"case": CASES[r["case"]], "tokens": r["tokens"], "setting": LABELS[key]}
        | {part: parts[part] for part in PARTS}
        | {"speedup": r["speedup"][key], "later_token": parts.get("later_token")}
        | {f"{k}_mib": mib(parts.get(f"{k}_bytes")) for k in ("kv", "peak")}
        | {"rounds": r["rounds"], "machine": r["machine"]}
        for r in records
        if "parts" in r
        for key, parts in r["parts"].items()
    ]
    for r in compared(records):
        setting = f"tower alone, tower ratio {r['tower_ratio']:g}"
        facts = {"case": CASES[r["case"]], "setting": setting, "tower": r["seconds"]}
        facts |= {"choose": r["choose_s"], "full_tower": r["full_s"], "flop_limit": r["flop_limit"]}
        rows.append(facts | {k: r[k] for k in ("speedup", "rounds", "machine")})
    return rows
