"""Videos longer than the model was trained on: what window extension and pooling each buy.

    python benchmarks/accuracy/long_video.py            # → long_video.json, LONG_VIDEO.md

ShapesQA test videos of 16 frames (the longest in training) and longer. Compressed runs keep as many
tokens as 16 frames have. With and without `extend_visual_context`, whose window is the trained 512
tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from run import tower_once

from tokencomp import extend_visual_context
from tokencomp.evaluation.environment import environment, provenance
from tokencomp.evaluation.examples import shapesqa
from tokencomp.evaluation.metrics import mcnemar
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import Setting
from tokencomp.zoo import load
from tokencomp.zoo.shapesqa import items

HERE = Path(__file__).parent
TRAINED_FRAMES, TRAINED_TOKENS = 16, 512
FAMILIES = ("needle", "video_existence")
TOKENS_AT_ONCE = 12288  # visual tokens of a batch
METHODS = ("pool", "condiv", "random")


def measure(
    name: str, frames: int, per_family: int, families: Sequence[str], media: Path
) -> list[dict[str, Any]]:
    """Accuracy of every method on videos of one length, without and with extension."""
    model, processor = load(name)
    asked = items("test", per_family, families, frames=frames)
    examples = shapesqa(asked, media / str(frames))
    ratio = 1 - TRAINED_FRAMES / frames
    settings = [Setting(), *(Setting(m, ratio) for m in METHODS if ratio)]
    target, rows, base = TRAINED_TOKENS * frames // TRAINED_FRAMES, [], []
    batch = max(1, TOKENS_AT_ONCE // target)
    for extended in (False, True) if ratio else (False,):
        window = contextlib.nullcontext()
        if extended:
            window = extend_visual_context(model, target, window=TRAINED_TOKENS)
        with window, tower_once(model):
            runs = sweep(model, processor, examples, settings, frames=frames, batch_size=batch)
        for setting, run in runs.items():
            right = [int(r["correct"]) for r in run.records]
            base = base or right
            rows.append(
                {
                    "frames": frames,
                    "method": setting.reducer,
                    "extended": extended,
                    "visual_tokens": run.records[0]["per_layer"][0],
                    "accuracy": run.mean("correct"),
                    "p_vs_full": mcnemar(right, base).p,
                    "items": len(right),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| frames | method | extended | visual tokens | accuracy | p vs full |",
        "|---" * 6 + "|",
    ]
    for r in rows:
        lines.append(
            f"| {r['frames']} | {r['method']} | {'yes' if r['extended'] else 'no'} | "
            f"{r['visual_tokens']} | {r['accuracy']:.1%} | {r['p_vs_full']:.2g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-qwen2-vl")
    parser.add_argument("--frames", nargs="+", type=int, default=(16, 32, 64))
    parser.add_argument("--per-family", type=int, default=50)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    media = HERE / "results" / "media" / "long"
    asked = (args.per_family, args.families, media)
    rows = [r for n in args.frames for r in measure(args.model, n, *asked)]
    data = {"model": args.model, **environment(), "rows": rows}
    (HERE / "long_video.json").write_text(json.dumps(data, indent=1) + "\n")
    head = "# Videos longer than trained\n\n" + __doc__.split("\n\n")[2].replace("\n", " ")
    told = (
        f"{args.model}, families {', '.join(args.families)}, {rows[0]['items']} items per length."
    )
    (HERE / "LONG_VIDEO.md").write_text(f"{head}\n\n{told} {provenance(data)}.\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
