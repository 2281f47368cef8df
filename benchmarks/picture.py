"""The picture of the project's README: what is kept of an image, and accuracy over ratio.

    python -m benchmarks.picture    # → docs/overview.png

Left: a sample image of the package, and the patches that the default reducer keeps for its question
at a ratio of 0.75. Right: retention on the learned families, from the published results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import tokencomp
from benchmarks.accuracy.store import RESULTS, Results
from benchmarks.accuracy.tables import BASELINES, kept
from tokencomp.cli import one_message
from tokencomp.inputs.media import load_media
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.method import DEFAULT_REDUCER
from tokencomp.pages.pictures import overlay, survival
from tokencomp.zoo import SAMPLES, load

MODEL, RATIO = "tiny-qwen3-vl", 0.75
QUESTION = "test-small_object-00002"
FILE = Path(__file__).parents[1] / "docs" / "overview.png"
COLORS = {"random": "#6b7280", "uniform": "#9ca3af", "downscale": "#d97706"}
SIDE = 448


def kept_patches() -> tuple[Image.Image, Image.Image, str, str]:
    """The image, the image with removed patches dimmed, its question, the compressed answer."""
    questions = json.loads((SAMPLES / "questions.json").read_text())
    item = next(q for q in questions if q["id"] == QUESTION)
    image = load_media(SAMPLES / item["media"])
    model, processor = load(MODEL)
    inputs = build_inputs(processor, [[image]], [item["question"]])
    with tokencomp.patch(model, RATIO) as handle:
        answer = generate(model, processor, inputs, max_new_tokens=4)[0]
        share = survival(handle.stats)[0]
    return image.resize((SIDE, SIDE)), overlay(image, share[0], SIDE), item["question"], answer


def curve(axes: Any, results: Results) -> None:
    """Retention with its 95 % interval, for the default, merging or not, and the baselines."""
    rows = [
        (results.default, "", f"{DEFAULT_REDUCER}, the default", "#2563eb"),
        (results.default, "-merge=False", f"{DEFAULT_REDUCER}, merge=False", "#16a34a"),
        *((name, "", name, COLORS[name]) for name in BASELINES),
    ]
    for name, options, label, color in rows:
        points = [(r, kept(results, f"{name}-{r:g}{options}", "both")) for r in results.ratios]
        ratios = [r for r, value in points if value is not None]
        values = [value for _, value in points if value is not None]
        accuracy = [100 * value.value for value in values]
        width = 2.4 if name == results.default else 1.6
        axes.plot(ratios, accuracy, "o-", color=color, label=label, lw=width)
        bounds = [[100 * getattr(value, side) for value in values] for side in ("low", "high")]
        axes.fill_between(ratios, *bounds, color=color, alpha=0.12, lw=0)
    axes.set_xlabel("ratio: share of visual-token work removed")
    axes.set_ylabel("accuracy kept, %")
    axes.set_xticks(results.ratios)
    axes.set_ylim(30, 105)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    count = len(results.select("both", results.learned))
    axes.set_title(f"embedded {results.manifest['model']}, {count} questions", fontsize=10)


def main() -> None:
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    image, dimmed, question, answer = kept_patches()
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.7))
    titles = (question, f"ratio {RATIO:g}, answer: {answer}")
    for axes, picture, title in zip(panels, (image, dimmed), titles, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    curve(panels[2], Results.read(RESULTS / MODEL, "test").averaged())
    FILE.parent.mkdir(exist_ok=True)
    figure.savefig(FILE, dpi=110, metadata={"Software": None})
    print(FILE)


if __name__ == "__main__":
    with one_message():
        main()
