"""The model card of a model that writes long answers.

python -m recipes.long.card FOLDER --command "..." --seconds 5000 --steps 3000
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from recipes.long.evaluate import answers, scores
from tokencomp.cli import one_message
from tokencomp.inputs.loading import load_folder
from tokencomp.storage import write_json, write_text
from tokencomp.zoo.shapesqa.long_scenes import FAMILIES, QUESTIONS, item

ITEMS = 50
"""Test items of each family; `benchmarks/long` asks the same."""
_TEMPLATE = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

tiny-qwen3-vl-hard, trained further to write long answers about drawn pictures, pages and clips
({parameters:.2f} M parameters, stored as float16; Qwen3VL in the stock Hugging Face layout). It
exists to show on any machine what visual token compression costs after the first token
([benchmark](../../../../benchmarks/long/README.md)). It knows these five questions alone:

{questions}

```python
from tokencomp import zoo
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.zoo.shapesqa.long_scenes import item

model, processor = zoo.load("{name}")
one = item("test", "describe", 0)
inputs = build_inputs(processor, [list(one.media())], [one.question])
print(generate(model, processor, inputs, 224)[0], one.answer, sep="\\n")
```

| | |
|---|---|
| visual tokens | 64 or 100 per picture, 36 per pair of frames (8 to 32 frames, two a second) |
| training | {training} |
| cost | {seconds} s on 1 CPU core beside other jobs ({steps} optimizer steps) |
| versions | torch {torch}, transformers {transformers} |

## Facts on the test split

Full model, greedy decoding. A fact is right if all of it is: an object with its size, colour and
place, a word at its turn, an event with its second, object, place and kind, a change with its
place. The test split was not used for any choice.

{table}
"""


def render(metrics: dict[str, Any]) -> str:
    """README.md of the model folder, from its metrics.json."""
    lines = [
        "| family | items | facts | right | invented, for 100 facts |",
        "|---|---|---|---|---|",
    ]
    for family, one in metrics["facts"].items():
        lines.append(
            f"| {family} | {one['items']} | {one['facts']} | {one['right']:.1%} "
            f"| {100 * one['invented']:.1f} |"
        )
    asked = {**QUESTIONS, "count": QUESTIONS["count"].format("red objects")}
    questions = "\n".join(f"- {family}: {text!r}" for family, text in asked.items())
    return _TEMPLATE.format(
        **metrics["model"], **metrics["training"], questions=questions, table="\n".join(lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--training", required=True, help="how it was trained, in words")
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--report", action="store_true", help="only write the card again")
    args = parser.parse_args()
    path = args.folder / "metrics.json"
    if not args.report:
        model, processor = load_folder(str(args.folder))
        items = [item("test", family, k) for family in FAMILIES for k in range(ITEMS)]
        count = sum(p.numel() for p in model.parameters()) / 1e6
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        found = {
            "model": {"name": args.folder.name, "parameters": count},
            "facts": scores(items, answers(model, processor, items, ITEMS)),
        }
    else:
        found = json.loads(path.read_text())
        versions = {name: found["training"][name] for name in ("torch", "transformers")}
    found["training"] = {
        "training": args.training, "seconds": args.seconds, "steps": args.steps, **versions,
    }  # fmt: skip
    write_json(path, found)
    write_text(args.folder / "README.md", render(found))


if __name__ == "__main__":
    with one_message():
        main()
