"""The engine: what happens to a prompt between the caller and the decoder layers.

    generate ─ body ─► read ──► plan ──► score ──► choose ──► gather ──► layers ──► restore
                       │        │        │         │          │          │          │
    arguments          Call,    counts   attention rows and   RowMap',   masks of   output of
    + modalities       RowMap   of spans scores    weights    arguments  layer      full length,
                                ▲                             of rows    types      cache: RowMap'
                                └────────────── again before a stage between layers ──┘

The order of the passes is in `decoder.py`. Each pass is a module: `prompt.py` (read), `call.py`
(counts of the plan), `scores.py` and `choose.py`, `gather.py`, `layers.py` with `masks.py`, and
`restore.py`. `later.py` has the calls after the prompt, and the chunks of a prompt. `checks.py`
lists what is refused before anything runs. Merging with weights is `weights.py`, and the stage in
the vision tower `tower/`.

Five data classes: `VisualSpan` (an image in the prompt), `RowMap` (which column every row holds),
`Tokens` (what a reducer sees), `Kept` (what it keeps), and `Call` (one decoder call).

Four coordinates, each with one name:

    column  place in the uncompressed sequence, over all calls and with padding. Positions, windows
            and the length of a cache count columns (with `positions="compact"` rows).
    row     place in what is held: hidden states of this call, or a cache layer. `RowMap.columns` is
            the column of every row. A flat row is sample · rows + row.
    patch   visual token of a span, without its special tokens and the text between frames. Reducers
            choose patches (`tokencomp.tokens.tokens`).
    cell    the patches of the vision tower that one visual token reads (`tower/`).

A second turn after a stage that keeps two of four visual tokens (v) of sample 0, and three of
sample 1, whose second turn has three padding columns:

    columns of both turns        0 1 2 3 4 5 | 6 7 8 9 10 11
    sample 0                     t v v v v t | t t t t t  t
    columns of the rows held     ·  0 1 4 5  |                 `rows` 5, one of them padding (·)
    sample 1                     t v v v v t | · · · t t  t
    columns of the rows held     0 1 2 4 5   |                 `dropped` 6 - 5 = 1, of every sample

The 2-D mask of the second turn, which transformers reads at entry `dropped` + row:

    entry         0 | 1 2 3 4 5 | 6 7 8 9 10 11      entry 0 is never read
    sample 0      1 | 0 1 1 1 1 | 1 1 1 1 1  1
    sample 1      1 | 1 1 1 1 1 | 0 0 0 1 1  1

The cache layers hold the map of the first turn (`current_map`: columns, and `real`, which is False
at the padding row of sample 0). In the second call `LaterTokens._continue` (`later.py`) reads the
padding of the new rows from the caller's mask, and `build_segments` (`call.py`) takes the held map
of every segment as `past` and the new rows as `new`. The masks (`masks.py`) join both: `_padding`
makes the mask above, and `_window` compares columns.

    layers of segment 0         before the decoder runs: `Masks.decoder_mask`, called by
                                `set_arguments` (prompt) and `LaterTokens._continue` (later turn)
    layers of other segments    when the first layer of a type is entered: `LayerType.mask`, by
                                the hook of the layer (`layers.py`), in place of the decoder's
"""
