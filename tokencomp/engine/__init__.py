"""The engine: what happens to a prompt between the caller and the decoder layers.

`decoder.py` has the order of the passes, and `docs/structure.md` a drawing of them, one walk of a
prompt, and the subject of every module. Here are the words, and an example of two turns.

Five data classes: `VisualSpan` (an image in the prompt), `RowMap` (which column every row holds),
`Tokens` (what a reducer sees), `Kept` (what it keeps), and `Call` (one decoder call).

Four coordinates, each with one name, and `entry`, which transformers counts:

    column  place in the uncompressed sequence, over all calls and with padding. Positions, windows
            and the length of a cache count columns (with `positions="compact"` rows).
    row     place in what is held: hidden states of this call, or a cache layer. `RowMap.columns` is
            the column of every row. A flat row is sample · rows + row.
    patch   visual token of a span, without its special tokens and the text between frames. Reducers
            choose patches (`tokencomp.tokens.tokens`).
    cell    the patches of the vision tower that one visual token reads (`tower/`).
    entry   place in a 2-D mask of transformers: `dropped` + row, see the drawing.

A *segment* is the layers from one stage between layers to the next: they see the same rows, of this
call and in the cache. Segment 0 begins with layer 0, after a stage at entry if there is one.

Two prompts, a stage that keeps two of four visual tokens (v) of sample 0 and three of sample 1, and
a second turn, in which sample 1 has three padding columns (p):

    columns of both turns        0 1 2 3 4 5 | 6 7 8 9 10 11
    sample 0                     t v v v v t | t t t t t  t
    sample 1                     t v v v v t | p p p t t  t
    columns of the rows held
        sample 0                 ·  0 1 4 5      · is a padding row: rows are aligned to the right
        sample 1                 0 1 2 4 5
    of the batch                 `rows` 5 (of the longest sample), `dropped` 6 - 5 = 1

The cache tells transformers its length in columns (`get_seq_length`: rows + `dropped`), so that
positions go on, and that its first row is at entry `dropped` (`get_mask_sizes`). So transformers
reads row i of the 2-D mask at entry `dropped` + i, and never the entries before:

    entry                        0 | 1 2 3 4 5 | 6 7 8 9 10 11
    column of its row, sample 0      ·  0 1 4 5  6 7 8 9 10 11
    mask of sample 0             1 | 0 1 1 1 1 | 1 1 1 1 1  1
    mask of sample 1             1 | 1 1 1 1 1 | 0 0 0 1 1  1

First call: `_map` (`prompt.py`) reads the caller's mask, as `lengths` of samples that are aligned
to the right; a stage shortens them (`RowMap.keep`); the rows before a shorter sample are padding
(`RowMap.mask`), whether the caller or a stage made it shorter. `note_prompt` (`cache.py`) gives
the map to the cache layers.

Second call: `DecoderHooks._enter` (`decoder.py`) finds a compressed cache. (A turn with media goes
through the seven passes again, with the map of the cache as `past`.) `LaterTokens._turn`
(`later.py`) reads the padding of the turn, which are the last columns of the caller's mask;
`build_segments` (`call.py`) takes the map of the cache as `past` and the new rows as `new`; and
`Masks` (`masks.py`) joins both in the 2-D mask above (`_padding`), or in a mask per layer type.

If the stage merges (sample 0: columns 2 and 3 into column 1), attention counts a row as the tokens
that it represents, in the first call and in all later ones (`weights.py`):

    columns of the rows held, sample 0      ·  0 1 4 5
    `RowMap.weights`                        1  1 3 1 1

In the second call, masks are then numbers: log(weight) of every visible key (`Masks.of`). Where
attention takes no numbers, its heads are wider, as in the first call.

Last, `note_turn` (`cache.py`) stores which rows, of both turns, are real in the cache layers.
"""
