"""The pictures of the README: what is kept of an image, and accuracy over ratio.

    python -m benchmarks.picture    # → docs/kept.png, docs/accuracy.png

The first has a sample image of the package and the patches that the default keeps of it at a ratio
of 0.75, without reading a question; the others, which are merged into these, are pale. The second
is retention on the learned families, from the published results. They are legible at 340 points,
the width of a phone, and transparent, for light and dark pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokencomp
from benchmarks.accuracy.report import BASELINES, kept
from benchmarks.accuracy.store import RESULTS, Results
from tokencomp.cli import one_message
from tokencomp.inputs.media import load_media
from tokencomp.inputs.prompts import build_inputs, generate
from tokencomp.method import DEFAULT_REDUCER
from tokencomp.pages.pictures import survival
from tokencomp.zoo import SAMPLES, load

MODEL, RATIO = "tiny-qwen3-vl", 0.75
PICTURE = "test-small_object-00002.jpg"
INK = "#7d8590"
"""Grey that can be read on a white and on a dark page."""
DOCS = Path(__file__).parents[1] / "docs"
SIZE, DPI, FONT = (5.6, 3.5), 120, 15
COLORS = {"random": "#6b7280", "uniform": "#9ca3af", "downscale": "#d97706"}
SIDE = 448


def kept_patches() -> tuple[Image.Image, Image.Image, int, int]:
    """The image, the image with merged patches pale, and the tokens of both."""
    image = load_media(SAMPLES / PICTURE)
    model, processor = load(MODEL)
    inputs = build_inputs(processor, [[image]], ["Describe the picture."])
    with tokencomp.patch(model, RATIO) as handle:
        generate(model, processor, inputs, max_new_tokens=1)
        (share,), stats = survival(handle.stats), handle.stats
    shown = image.resize((SIDE, SIDE))
    pale = Image.blend(shown, Image.new("RGB", shown.size, "white"), 0.7)
    kept = Image.fromarray(np.uint8(255 * share[0])).resize(shown.size, Image.Resampling.NEAREST)
    tokens = stats.tokens_before[0], stats.tokens_after[0][-1]
    return shown, Image.composite(shown, pale, kept), *tokens


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
        axes.plot(ratios, accuracy, "o-", color=color, label=label, lw=1.3 * width)
        bounds = [[100 * getattr(value, side) for value in values] for side in ("low", "high")]
        axes.fill_between(ratios, *bounds, color=color, alpha=0.12, lw=0)
    axes.set_xlabel("ratio: share of image tokens removed")
    axes.set_xticks(results.ratios, [f"{ratio:g}" for ratio in results.ratios])
    axes.tick_params(labelsize=FONT - 3)
    axes.set_ylim(30, 105)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left", fontsize=FONT - 3, borderaxespad=0)
    axes.set_title("accuracy kept, %, tiny model", fontsize=FONT)


def main() -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    image, merged, before, after = kept_patches()
    colors = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with rc_context({"font.size": FONT, **dict.fromkeys(colors, INK)}):
        kept_figure, curve_figure = (Figure(SIZE, layout="constrained") for _ in range(2))
        panels = kept_figure.subplots(1, 2)
        titles = (f"{before} image tokens", f"{after}, the pale ones merged")
        for axes, picture, title in zip(panels, (image, merged), titles, strict=True):
            axes.imshow(picture)
            axes.set_title(title, fontsize=FONT)
            axes.set_axis_off()
        kept_figure.supxlabel("chosen by features; no question is read", fontsize=FONT, color=INK)
        curve(curve_figure.subplots(), Results.read(RESULTS / MODEL, "test").averaged())
        for name, figure in (("kept", kept_figure), ("accuracy", curve_figure)):
            path = DOCS / f"{name}.png"
            figure.savefig(path, dpi=DPI, transparent=True, metadata={"Software": None})
            print(path)


if __name__ == "__main__":
    with one_message():
        main()
