"""Which words of scanned receipts every method keeps: no labels and no answers, only boxes.

    python -m benchmarks.screens.receipts FOLDER    # receipts.json, receipts.md
    python -m benchmarks.screens.receipts --report  # only the page

FOLDER is a checkout of the git repository zzzDavid/ICDAR-2019-SROIE, or its `data`. The rights of
its pictures are not stated: nothing of them is stored here but counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tokencomp
from benchmarks.accuracy.run import tower_once
from benchmarks.experiment import Experiment
from benchmarks.publishing import table
from tokencomp.errors import OptionError
from tokencomp.evaluation.coverage import Box, load_boxes, touched, words_kept
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.prompts import build_inputs
from tokencomp.pages.pictures import survival
from tokencomp.reducers._pixels import cells_of
from tokencomp.reducers.pixelprune import unpredicted_cells
from tokencomp.reducers.registry import make_reducer

MODEL = "tiny-qwen3-vl-hard"
CELL = 32
"""Pixels a side of one visual token of Qwen3-VL."""
FLAT = 40  # range of values under which a cell of a scan counts as nearly flat
QUESTION = "What is the total?"
RATIOS = (0.3, 0.5, 0.75)
COUNTED = (784, 1280)  # tokens per page at most
MAIN, OTHERS = 784, (256, 1280)
PIXELS = "kcenter, tower"
METHODS = (
    "random", "uniform", "kcenter", PIXELS, "condiv", "divprune", "cdpruner", "scope", "bipartite",
    "mmtok", "anchorprune", "visionzip", "visprune", "hiprune", "holov", "fastv", "sparsevlm",
    "pyramiddrop",
)  # fmt: skip
AT_EVERY_SIZE = ("random", "uniform", "kcenter")


@dataclass(frozen=True)
class Receipt:
    """One scan, and the boxes of its words in pixels of the file."""

    path: Path
    boxes: list[Box]

    @property
    def image(self) -> Image.Image:
        with Image.open(self.path) as image:
            return image.convert("RGB")


def receipts(folder: Path) -> list[Receipt]:
    """All scans of a checkout, by name."""
    found = [
        Receipt(path, load_boxes(boxes))
        for path in sorted(folder.rglob("img/*.jpg"))
        if (boxes := path.parents[1] / "box" / f"{path.stem}.csv").exists()
    ]
    if not found:
        raise OptionError(
            f"{folder} holds no receipts. Give a checkout of zzzDavid/ICDAR-2019-SROIE, in which "
            "they are data/img/*.jpg and data/box/*.csv."
        )
    return found


def resized(image: Image.Image, tokens: int) -> Tensor:
    """A picture of whole cells, at most so many, uint8 (height, width, 3); never enlarged."""
    scale = min(1.0, (tokens * CELL**2 / (image.width * image.height)) ** 0.5)
    width, height = (max(1, int(side * scale / CELL)) * CELL for side in image.size)
    shrunk = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(shrunk).copy())


def copies(one: Tensor) -> Tensor:
    """Cells that equal an earlier cell of the picture in every bit, bool (rows, columns)."""
    cells = cells_of(one, CELL)
    seen: set[bytes] = set()
    out = torch.zeros(cells.shape[:2], dtype=torch.bool)
    for k, cell in enumerate(cells.flatten(0, 1).numpy()):
        value = cell.tobytes()
        out.view(-1)[k] = value in seen
        seen.add(value)
    return out


def flat(one: Tensor) -> Tensor:
    """Cells whose values of one colour lie within `FLAT` of each other, bool (rows, columns)."""
    cells = cells_of(one, CELL).unflatten(-1, (-1, 3)).short()
    return (cells.amax(2) - cells.amin(2)).amax(-1) <= FLAT


def counts(receipt: Receipt, tokens: int) -> dict[str, float]:
    """Shares of the cells of a page that are flat, copies, predicted, or touched by a word."""
    image = receipt.image
    shown = resized(image, tokens)
    cells = cells_of(shown, CELL)
    words = np.zeros(cells.shape[:2], bool)
    for box in receipt.boxes:
        words |= touched(box, image.size, words.shape)
    shares = {
        "words": torch.from_numpy(words),
        "flat": flat(shown),
        "copies": copies(shown),
        "pixelprune 0": unpredicted_cells(cells[None]),
        "pixelprune 8": unpredicted_cells(cells[None], 8),
    }
    return {"tokens": words.size} | {k: float(v.float().mean()) for k, v in shares.items()}


def kept_cells(
    model: Any, inputs: dict[str, Tensor], method: str
) -> Iterator[tuple[float, np.ndarray]]:
    """Per ratio: the cells of a page that the last layer sees, bool (rows, columns)."""
    pixels = method == PIXELS
    reducer = make_reducer("kcenter" if pixels else method)
    runs_tower = pixels or any(signal.source == "tower" for signal in reducer.needs)
    with nullcontext() if runs_tower else tower_once(model):
        for ratio in RATIOS:
            tower = {"tower_ratio": ratio, "tower_reducer": reducer} if pixels else {}
            handle = tokencomp.patch(model, ratio, reducer=reducer, **tower)
            try:
                with torch.inference_mode():
                    model(**inputs)
                yield ratio, survival(handle.stats, len(handle.stats.layers) - 1)[0][0] == 1
            finally:
                tokencomp.unpatch(model)


def coverage(
    model: Any, processor: Any, receipt: Receipt, tokens: int, methods: Sequence[str]
) -> list[dict[str, Any]]:
    """What every method and ratio leaves the last layer of one page."""
    side = 28  # pixels of a token of this model
    processor.image_processor.size = {"shortest_edge": side**2, "longest_edge": tokens * side**2}
    image = receipt.image
    inputs = build_inputs(processor, [[image]], [QUESTION])
    return [
        {
            "tokens": tokens,
            "method": method,
            "ratio": ratio,
            "kept": float(last.mean()),
            "words": words_kept(last, receipt.boxes, image.size),
        }
        for method in methods
        for ratio, last in kept_cells(model, inputs, method)
    ]


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method, ratio and tokens: means over pages, and the lower quartile of words."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["tokens"], record["method"], record["ratio"]), []).append(record)
    return [
        {
            "tokens": tokens,
            "method": method,
            "ratio": ratio,
            "pages": len(some),
            "kept": float(np.mean([r["kept"] for r in some])),
            "words": float(np.mean([r["words"] for r in some])),
            "words of a bad page": float(np.quantile([r["words"] for r in some], 0.25)),
        }
        for (tokens, method, ratio), some in groups.items()
    ]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Counts over all pages, and coverage over every so many."""
    from tqdm import tqdm

    if args.folder is None:
        raise OptionError("give the FOLDER of the receipts, or --report.")
    torch.set_num_threads(1)
    found, pages = receipts(args.folder), {}
    for tokens in COUNTED:
        rows = [counts(one, tokens) for one in tqdm(found, f"{tokens} tokens")]
        total = sum(row["tokens"] for row in rows)
        pages[str(tokens)] = {
            name: sum(row[name] * row["tokens"] for row in rows) / total for name in rows[0]
        } | {"tokens": total / len(rows)}
    model, processor = load_model(MODEL)
    records = []
    for one in tqdm(found[:: args.every], "coverage"):
        records += coverage(model, processor, one, MAIN, METHODS)
        for tokens in OTHERS:
            records += coverage(model, processor, one, tokens, AT_EVERY_SIZE)
    words = [len(one.boxes) for one in found[:: args.every]]
    yield {
        "model": MODEL,
        "receipts": len(found),
        "asked": len(words),
        "boxes": sum(words),
        "pages": pages,
        "rows": summary(records),
    }


TEXT = """# Which words of a scanned receipt does every method keep?

`python -m benchmarks.screens.receipts FOLDER` over
[SROIE](https://github.com/zzzDavid/ICDAR-2019-SROIE) (scanned receipts with a box around every line
of text; the rights of the pictures are not stated, so none is stored here). A line counts as kept
if the last decoder layer still sees at least half of the cells that its box touches.
`tokencomp inspect --image page.png --boxes words.csv` counts the same on a page of yours.

## All methods, pages of at most {main} tokens

Mean over {asked} receipts ({boxes:,} lines), and in brackets what a quarter of the pages falls
below. Methods that act between layers (`fastv`, `sparsevlm`, `pyramiddrop`) leave the last layer
fewer cells than the ratio says.

{methods}

**The scores come from a tiny model** (`{model}`, 2.3 M parameters, trained on drawn
shapes and single words): attention and features of a 7B model rank cells differently, and may do
better or worse. `random`, `uniform` and `kcenter, tower` (pixels alone, before the vision tower) do
not depend on a model's weights.

**Kept cells are not read words.** An audit on Qwen3-VL-8B (arXiv 2608.00077, DocVQA, pages of about
784 tokens, ratio 0.3) answers fewer questions on a uniform grid (82.2%) than with random tokens
(86.0%; all tokens 93.9%), though a grid keeps more lines. So coverage can rule a ratio out, and
cannot show that it is safe.

## By tokens per page

{sizes}

## What can go at all

Over all {receipts} receipts, in cells of 32 × 32 pixels (one token of Qwen3-VL), pages shrunk to at
most so many tokens:

{pages}

Every line can keep *all* of its cells only at a ratio below one minus the first share. PixelPrune
at threshold 0 is lossless: what it drops equals a kept neighbour.
"""
PAGES_HEAD = (
    "tokens at most",
    "mean",
    "touched by words",
    "nearly flat",
    "equal to an earlier cell",
    "kept by PixelPrune, 0",
    "kept by PixelPrune, 8",
)


def page(stored: dict[str, Any]) -> str:
    """The page of what `measure` in `receipts` returned."""
    rows = {(r["tokens"], r["method"], r["ratio"]): r for r in stored["rows"]}
    ratios = list(dict.fromkeys(ratio for *_, ratio in rows))
    sizes = list(dict.fromkeys(tokens for tokens, *_ in rows))
    main = sizes[0]
    names = list(dict.fromkeys(name for tokens, name, _ in rows if tokens == main))
    names.sort(key=lambda name: -rows[main, name, ratios[1]]["words"])
    head = ["method", *(f"ratio {ratio:g}" for ratio in ratios)]
    everywhere = [name for name in names if all((s, name, ratios[0]) in rows for s in sizes)]
    return TEXT.format(
        main=main,
        asked=stored["asked"],
        boxes=stored["boxes"],
        receipts=stored["receipts"],
        model=stored["model"],
        methods=table(
            head,
            [[f"`{n}`", *(_both(rows[main, n, ratio]) for ratio in ratios)] for n in names],
            right=len(ratios),
        ),
        sizes=table(
            ["method", "tokens at most", *head[1:]],
            [
                [f"`{name}`", f"{size:,}", *(_both(rows[size, name, ratio]) for ratio in ratios)]
                for name in everywhere
                for size in sorted(sizes)
            ],
            right=len(ratios) + 1,
        ),
        pages=table(
            PAGES_HEAD,
            [
                [
                    f"{int(size):,}",
                    f"{found['tokens']:.0f}",
                    *(
                        f"{found[name]:.1%}"
                        for name in ("words", "flat", "copies", "pixelprune 0", "pixelprune 8")
                    ),
                ]
                for size, found in stored["pages"].items()
            ],
            right=7,
        ),
    )


def _both(row: dict[str, Any]) -> str:
    return f"{row['words']:.1%} ({row['words of a bad page']:.1%})"


OPTIONS = {
    "FOLDER": (None, "checkout of ICDAR-2019-SROIE"),
    "every": (45, "coverage of every so many receipts"),
}
EXPERIMENT = Experiment("screens/receipts", measure, page, lambda stored: stored["rows"], OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
