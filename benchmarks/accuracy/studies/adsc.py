"""The trained ADSC adapter against the training-free reducer, random choice and a control.

    tokencomp train adsc --model tiny-qwen2-vl --output benchmarks/accuracy/adsc ...
    python -m benchmarks.accuracy.studies.adsc --weights benchmarks/accuracy/adsc --control FOLDER

writes adsc.json (tables, provenance, packed answers) and adsc.md. "full" is the model without
adapter and without compression. "trained" at ratio 0 shows what the adapter costs. "control" is an
adapter that was trained as long without compression and runs with the same reducer: it shows which
part of a gain comes from the fine-tuning alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from benchmarks.accuracy.store import ACCURACY
from benchmarks.accuracy.studies.trained import Found, Study, measure, named
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import WeightsError
from tokencomp.inputs.loading import load_model
from tokencomp.trained.cards import check_card, model_facts
from tokencomp.training.adsc import CARD, FILES, AdscConfig, comparison
from tokencomp.training.data import ShapesQuestions

SETS = {
    "count": (("count",), 1),
    "other images": (("attribute", "small_object", "existence"), 1),
    "video": (("needle",), 2),
}
RATIOS = (0.0, 0.5, 0.67, 0.8, 0.9)
NOTES = (
    "Training for compression improves count questions. On the other images the control gains as "
    "much, so that gain comes from the fine-tuning. On the videos the training-free form loses "
    "next to nothing below 0.9, and at 0.9 neither adapter helps."
)
RIVALS = {"trained": ("training-free", "control"), "control": ("training-free",)}


def measured(args: argparse.Namespace) -> Iterator[Found]:
    """All forms on every set."""
    folders = {"trained": Path(args.weights or ACCURACY / "adsc")}
    methods = comparison(AdscConfig(ratios=RATIOS))
    methods += [named("trained, random", r, "random", {}, "tuned") for r in RATIOS if r]
    if args.control:
        folders["control"] = Path(args.control)
        methods += [named("control", r, "adsc", {}, "control") for r in RATIOS]
    models, cards = {}, {name: folder / CARD for name, folder in folders.items()}
    for name in folders:
        model, processor = load_model(args.model, device=args.device)
        models[name] = load_adapter(model, folders[name])
    variants = {"": models["trained"], "tuned": models["trained"], **models}
    for name in args.sets:
        families, fewer = SETS[name]
        source = ShapesQuestions(families, args.items // fewer, args.split)
        found, every = measure(variants, processor, source, methods, name, args.batch)
        yield name, found.table(every), found.runs, cards


def load_adapter(model: Any, folder: Path) -> Any:
    """`model` with a trained adapter, in evaluation mode.

    Like `peft.PeftModel.from_pretrained`, but the folder is checked before the hub is searched.

    Raises
    ------
    WeightsError
        `folder` holds no adapter, or one for another model.
    """
    import peft

    train = f"tokencomp train adsc --model MODEL --output {folder}"
    if missing := [n for n in (*FILES, CARD) if not (folder / n).is_file()]:
        raise WeightsError(f"{folder}: no {' and no '.join(missing)}. Train an adapter: {train}")
    try:
        card = dict(json.loads((folder / CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{folder / CARD} cannot be read ({error}). Train again: {train}") from (
            error
        )
    check_card(card, model_facts(adapter_for(model)), folder, train)
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{folder} cannot be read ({error}). Train again: {train}") from error


OPTIONS = {"control": (None, "adapter trained with --schedule 0")}
STUDY = Study("adsc", SETS, measured, RIVALS, NOTES, OPTIONS)


if __name__ == "__main__":
    STUDY.main(__doc__)
