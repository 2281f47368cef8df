"""The ccam projector against pooling and random choice at as many tokens, by number of frames.

    tokencomp train ccam --model tiny-qwen2-vl --output FOLDER ...
    python benchmarks/accuracy/ccam.py

writes ccam.json (tables, versions) and ccam.jsonl (every answer): images, videos of the trained 8
frames, and of 16 and 48 frames. `--free FOLDER` adds a projector that was trained without the
causal mask (`--no-causal`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trained import parser, publish

from tokencomp.projectors.ccam import CCAMProjector
from tokencomp.training.ccam import visual_tokens, ways
from tokencomp.training.data import ShapesQuestions
from tokencomp.training.loop import LoopConfig
from tokencomp.training.measure import Measurement, Way

SETS = {
    "image": (("attribute", "small_object"), {}, 1),
    "video, 8 frames": (("needle",), {"frames": 8}, 1),
    "video, 16 frames": (("needle",), {"frames": 16}, 2),
    "video, 48 frames": (("needle",), {"frames": 48}, 4),
}


def main(args: argparse.Namespace) -> None:
    from tokencomp.evaluation.loading import load_model

    model, processor = load_model(args.model, device=args.device)
    weights = Path(args.weights or Path(model.config._name_or_path) / "tokencomp")
    queries = CCAMProjector.load(weights).config.queries
    tables, records = {}, []
    for name, (families, scene, fewer) in SETS.items():
        source = ShapesQuestions(families, args.items // fewer, args.split, **scene)
        asked = ways(weights, queries, visual_tokens(model, processor, source, LoopConfig()))
        if args.free:
            options = {"weights": str(args.free)}
            asked.append(Way("ccam without mask", asked[0].ratio, "ccam", options))
        measured = Measurement({"": model}, processor, batch=max(2, args.batch // fewer**2))
        measured.run(source, asked, name)
        tables[name] = {"rows": measured.table(asked)}
        records += [{"set": name, **r} for r in measured.records]
        publish("ccam", args, tables, records, weights / "ccam.json")


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--free", help="projector trained with --no-causal")
    main(arguments.parse_args())
