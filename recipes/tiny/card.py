"""The model card of a tiny model, generated from the metrics measured when it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORM_NAMES = {
    "free": "one word",
    "mvbench": "letter, MVBench prompt",
    "mlvu": "letter, MLVU prompt",
}

# Parts of a card that the ``card`` of a family may replace.
USUAL = {
    "layout": "stock Hugging Face layout",
    "imports": "from transformers import AutoModelForImageTextToText, AutoProcessor",
    "model_class": "AutoModelForImageTextToText",
    "processor_class": "AutoProcessor",
}

_TEMPLATE = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

A {parameters:.2f} M parameter {architecture} in the {layout}, trained from scratch
on ShapesQA (procedural images and videos) by tokencomp. It answers questions about coloured shapes
and nothing else; it exists to show on any machine what visual token compression costs.

```python
{imports}

model = {model_class}.from_pretrained("{name}")  # path of this folder
processor = {processor_class}.from_pretrained("{name}")
```

| | |
|---|---|
| parameters | {parameters:.2f} M ({vision:.2f} M vision), stored as float16 |
| decoder | {layers} layers, hidden {hidden}, {heads} heads |
| visual tokens | {tokens} |
| trained on | {trained_on} |
| training | `{command}`, seed {seed} |
| cost | {seconds:.0f} s on {cores} CPU {unit} ({steps} optimizer steps) |
| versions | torch {torch}, transformers {transformers} |
{note}
## Accuracy on the test split

Full model, greedy decoding, JPEG and mp4 files read back from disk. The test split was not used for
any choice. A blind guess is the commonest answer, or one of the options at random, whichever scores
more: a family that is not clearly above it has not been learnt.

{table}
{bars}
"""


def table(results: dict[str, dict[str, dict[str, float]]], blind: dict[str, float]) -> str:
    """Markdown table: families by prompt forms, with item counts and the blind baseline."""
    forms = list(results)
    names = list(dict.fromkeys(family for form in forms for family in results[form]))
    lines = [
        "| family | items | blind guess | "
        + " | ".join(FORM_NAMES.get(form, form) for form in forms)
        + " |",
        "|---|---|---|" + "---|" * len(forms),
    ]
    for name in names:
        cells = [results[form].get(name) for form in forms]
        items = next(cell["items"] for cell in cells if cell)
        shown = [f"{100 * cell['accuracy']:.1f} %" if cell else "" for cell in cells]
        lines.append(
            f"| {name} | {items:.0f} | {100 * blind[name]:.1f} % | " + " | ".join(shown) + " |"
        )
    return "\n".join(lines)


def render_card(metrics: dict[str, Any]) -> str:
    """README.md of the model folder. ``metrics`` is the content of its metrics.json."""
    facts = {**USUAL, **metrics["model"], **metrics["training"]}
    bars = ""
    if metrics.get("other_shapes"):
        lines = [
            f"- {row['what']}: {100 * row['accuracy']:.1f} % ({row['items']} items)"
            for row in metrics["other_shapes"]
        ]
        bars = "\nOther sizes, lengths and scenes (one word):\n\n" + "\n".join(lines)
    facts["unit"] = "core" if facts["cores"] == 1 else "cores"
    note = facts.pop("note", "")
    facts["note"] = f"\n{note}\n" if note else ""
    return _TEMPLATE.format(**facts, table=table(metrics["test"], metrics["blind"]), bars=bars)


def write_card(folder: Path, metrics: dict[str, Any]) -> Path:
    """Write ``README.md`` beside the weights."""
    path = Path(folder) / "README.md"
    path.write_text(render_card(metrics).rstrip() + "\n")
    return path
