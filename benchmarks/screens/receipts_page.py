"""The page of word coverage over receipts."""

from __future__ import annotations

from typing import Any

from benchmarks.publishing import table

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
