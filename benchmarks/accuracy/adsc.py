"""The trained ADSC adapter against the training-free reducer and random choice.

    tokencomp train adsc --model tiny-qwen2-vl --output benchmarks/accuracy/adsc ...
    python benchmarks/accuracy/adsc.py --weights benchmarks/accuracy/adsc

writes adsc.json (tables, versions) and adsc.jsonl (every answer). "full" is the model without
adapter and without compression; "trained" at ratio 0 says what the adapter costs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trained import HERE, parser, publish

from tokencomp.evaluation.metrics import mcnemar
from tokencomp.training.adsc import CARD, AdscConfig, ways
from tokencomp.training.data import ShapesQuestions
from tokencomp.training.measure import Measurement, Way

SETS = {"image": (("attribute", "small_object", "existence"), 1), "video": (("needle",), 2)}
RATIOS = (0.0, 0.5, 0.67, 0.8, 0.9)


def main(args: argparse.Namespace) -> None:
    from peft import PeftModel

    from tokencomp.evaluation.loading import load_model

    model, processor = load_model(args.model, device=args.device)
    weights = Path(args.weights or HERE / "adsc")
    tuned = PeftModel.from_pretrained(model, str(weights)).eval()
    asked = ways(AdscConfig(ratios=RATIOS))
    asked += [Way("trained, random", r, "random", {}, "tuned") for r in RATIOS if r]
    tables, records = {}, []
    for name, (families, fewer) in SETS.items():
        source = ShapesQuestions(families, args.items // fewer, args.split)
        measured = Measurement({"": tuned, "tuned": tuned}, processor, batch=args.batch)
        measured.run(source, asked, name)
        rows = measured.table(asked)
        for row in rows:
            if row["name"] == "trained" and row["ratio"]:
                key = f"{row['ratio']:g}"
                mine, other = (measured.scores(f"{n}@{key}") for n in ("trained", "training-free"))
                test = mcnemar(mine, other)
                row["vs_training_free"] = {"wins": test.wins, "losses": test.losses, "p": test.p}
        tables[name] = {"rows": rows}
        records += [{"set": name, **r} for r in measured.records]
        publish("adsc", args, tables, records, weights / CARD)


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
