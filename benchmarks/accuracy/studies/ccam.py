"""The ccam projector against pooling and random choice at as many tokens, by number of frames.

    tokencomp train ccam --model tiny-qwen2-vl --output FOLDER ...
    python -m benchmarks.accuracy.studies.ccam

writes ccam.json (tables, provenance, packed answers) and ccam.md: images, videos of 8 frames as in
training, and of 16 and 48 frames. `--free FOLDER` adds a projector that was trained without the
causal mask (`--no-causal`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.accuracy.studies.trained import Found, Study, measure, named
from tokencomp.adapters.registry import adapter_for
from tokencomp.inputs.loading import load_model
from tokencomp.reducers.ccam import Ccam
from tokencomp.trained.cards import locate, model_facts
from tokencomp.training.ccam import comparison, sample_spans
from tokencomp.training.data import ShapesQuestions
from tokencomp.training.loop import LoopConfig

SETS = {
    "image": (("attribute", "small_object"), {}, 1),
    "video, 8 frames": (("needle",), {"frames": 8}, 1),
    "video, 16 frames": (("needle",), {"frames": 16}, 2),
    "video, 48 frames": (("needle",), {"frames": 48}, 4),
}
FREE = "ccam without mask"
RIVALS = {"ccam": (FREE, "pool"), FREE: ("pool",)}
TRAIN = "tokencomp train ccam"
NOTES = (
    "The shipped projector has the paper's causal mask. Without it, the projector answers at least "
    "as many questions correctly. The sets of 16 and 48 frames have a half and a quarter of the "
    "questions."
)


def measured(args: argparse.Namespace) -> Iterator[Found]:
    """The projectors, pooling and random choice on every set."""
    model, processor = load_model(args.model, device=args.device)
    facts = model_facts(adapter_for(model))
    files = {"ccam": locate(args.weights, facts, "ccam", TRAIN)}
    if args.free:
        files[FREE] = locate(args.free, facts, "ccam", f"{TRAIN} --no-causal")
    cards = {name: path.with_suffix(".json") for name, path in files.items()}
    queries = Ccam(str(files["ccam"])).queries()
    for name in args.sets:
        families, scene, fewer = SETS[name]
        source = ShapesQuestions(families, args.items // fewer, args.split, **scene)
        spans = sample_spans(model, processor, source, LoopConfig())
        methods = comparison(files["ccam"], queries, spans)
        if args.free:
            methods.append(named(FREE, methods[0].ratio, "ccam", {"weights": str(files[FREE])}))
        batch = max(2, args.batch // fewer**2)
        found, methods = measure({"": model}, processor, source, methods, name, batch)
        yield name, found.table(methods), found.runs, cards


OPTIONS = {"free": (None, "projector trained with --no-causal")}
STUDY = Study("ccam", SETS, measured, RIVALS, NOTES, OPTIONS)


if __name__ == "__main__":
    STUDY.main(__doc__)
