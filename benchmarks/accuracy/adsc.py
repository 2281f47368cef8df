"""The trained ADSC adapter against the training-free reducer, random choice and a control.

    tokencomp train adsc --model tiny-qwen2-vl --output benchmarks/accuracy/adsc ...
    python benchmarks/accuracy/adsc.py --weights benchmarks/accuracy/adsc --control FOLDER

writes adsc.json (tables, how they were made), adsc.jsonl (every answer) and adsc.md. "full" is the
model without adapter and without compression; "trained" at ratio 0 says what the adapter costs;
"control" is an adapter that was trained as long without compression, under the same reducer: what
of a gain is the fine-tuning's alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trained import HERE, Book, ask, parser

from tokencomp.cli import one_message
from tokencomp.training.adsc import CARD, AdscConfig, load_adapter, ways
from tokencomp.training.data import ShapesQuestions
from tokencomp.training.measure import Way

SETS = {
    "count": (("count",), 1),
    "other images": (("attribute", "small_object", "existence"), 1),
    "video": (("needle",), 2),
}
RATIOS = (0.0, 0.5, 0.67, 0.8, 0.9)
NOTES = (
    "Training for compression shows on questions about counts. On the other images the control "
    "gains as much, so that gain is the fine-tuning's; on the videos the training-free form loses "
    "next to nothing before 0.9, where neither adapter helps."
)
RIVALS = {"trained": ("training-free", "control"), "control": ("training-free",)}


def main(args: argparse.Namespace) -> None:
    from tokencomp.inputs.loading import load_model

    book = Book("adsc", args, RIVALS)
    folders = {"trained": Path(args.weights or HERE / "adsc")}
    asked = ways(AdscConfig(ratios=RATIOS))
    asked += [Way("trained, random", r, "random", {}, "tuned") for r in RATIOS if r]
    if args.control:
        folders["control"] = Path(args.control)
        asked += [Way("control", r, "adsc", {}, "control") for r in RATIOS]
    models = {}
    for name in folders if book.sets else ():
        model, processor = load_model(args.model, device=args.device)
        models[name] = load_adapter(model, folders[name])
    variants = {"": models.get("trained"), "tuned": models.get("trained"), **models}
    for name in book.sets:
        families, fewer = SETS[name]
        source = ShapesQuestions(families, args.items // fewer, args.split)
        measured, every = ask(variants, processor, source, asked, name, args.batch)
        cards = {n: folder / CARD for n, folder in folders.items()}
        book.add(name, measured.table(every), measured.records, cards)
        book.write(NOTES)
    book.write(NOTES)


if __name__ == "__main__":
    arguments = parser(__doc__, SETS)
    arguments.add_argument("--control", help="adapter trained with --schedule 0")
    with one_message():
        main(arguments.parse_args())
