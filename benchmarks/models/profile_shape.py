"""What `tokencomp profile` measures, for the shape of a published model with random weights.

    python -m benchmarks.models.profile_shape qwen2-vl-2b --tokens 8192 --ratio 0.5,0.75

No checkpoint is needed, and nothing is said about accuracy. Input baselines need pictures and a
processor, which a shape does not have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models import shapes
from tokencomp.cli import _parse as parse
from tokencomp.cli.profile import measure, show
from tokencomp.errors import OptionError
from tokencomp.evaluation.settings import INPUT_BASELINES, grid
from tokencomp.inputs.loading import pick_device, pick_dtype


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile one shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", help=", ".join(shapes.SHAPES))
    parser.add_argument("--tokens", type=int, default=2048, help="visual tokens of the prompt")
    parser.add_argument("--layers", type=int, help="of the decoder; by default all")
    parser.add_argument("--vision-layers", type=int, help="of the vision tower; by default all")
    parser.add_argument("--reducer", default="auto")
    parser.add_argument("--ratio", default="0.5,0.75,0.9")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after a warm-up")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("-o", "--output", type=Path, help="write JSON here")
    args = parser.parse_args(arguments)
    names = parse.names(args.reducer)
    if baselines := [name for name in names if name in INPUT_BASELINES]:
        raise OptionError(f"{', '.join(baselines)}: they shrink media before the processor.")
    settings = grid(names, parse.ratios(args.ratio))
    device = pick_device(args.device)
    size = {"layers": args.layers, "vision_layers": args.vision_layers}
    model, inputs = shapes.build(
        args.shape, args.tokens, dtype=pick_dtype(args.dtype, device), device=device, **size
    )
    inputs = shapes.accepted(model, inputs)
    name = f"{args.shape} (random weights)"
    report = measure(name, model, {s: (inputs, None) for s in settings}, args.rounds, True)
    show(report)
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
