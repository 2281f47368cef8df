"""Spans that structure finds are those that the inputs of the processor describe.

The expectation is written from the inputs alone: grids, tiles, and where placeholders stand.
Families that have code for their spans are in `test_spans.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import oracle
from support.families import FAMILIES, IMAGE, VIDEO, Family, Media, text
from support.prompts import pack
from torch import Tensor, nn

import tokencomp
from tokencomp.adapters.base import ENCODED
from tokencomp.tokens.tokens import Modality, VisualSpan

OWN_SPANS = ("llava_next", "llava_next_video", "llava_onevision", "vila")
FAMILY_NAMES = [name for name in FAMILIES if name not in OWN_SPANS]
TILE = (1, 4, 4)  # of every family without grids
Row = list[Any]


def media_of(inputs: dict[str, Tensor]) -> list[tuple[int, Modality, tuple[int, int, int]]]:
    """Placeholder id, kind and grid in tokens of what one `Media` brings, in order."""
    if "pixel_values" in inputs and "image_grid_thw" not in inputs:
        return [(IMAGE, "image", TILE)] * len(inputs["pixel_values"])
    found: list[tuple[int, Modality, tuple[int, int, int]]] = []
    for token, kind in ((IMAGE, "image"), (VIDEO, "video")):
        for t, h, w in inputs.get(f"{kind}_grid_thw", torch.zeros(0, 3)).tolist():
            found.append((token, kind, (t, h // 2, w // 2)))  # type: ignore[arg-type]
    return found


def expected(row: Row, start: int) -> list[VisualSpan]:
    """Spans of a row that begins in column `start`, walked token by token."""
    spans: list[VisualSpan] = []
    for item in row:
        ids = item.ids if isinstance(item, Media) else item
        if isinstance(item, Media):
            places = iter([start + i for i, token in enumerate(ids) if token in (IMAGE, VIDEO)])
            for token, kind, grid in media_of(item.inputs):
                columns = [next(places) for _ in range(math.prod(grid))]
                assert {ids[column - start] for column in columns} == {token}
                first, stop = columns[0], columns[-1] + 1
                gaps = tuple(c - first for c in range(first, stop) if c not in columns)
                spans.append(VisualSpan(first, stop - first, grid, kind, text=gaps))
            assert next(places, None) is None
        start += len(ids)
    return spans


def length(row: Row) -> int:
    return sum(len(item.ids if isinstance(item, Media) else item) for item in row)


def expectations(rows: list[Row]) -> list[list[VisualSpan]]:
    """Of a left-padded batch."""
    width = max(map(length, rows))
    return [expected(row, width - length(row)) for row in rows]


def random_rows(family: Family, seed: int, media: bool = True) -> list[Row]:
    """One to three samples with up to three media each, some side by side, and texts between."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for _ in range(draw.randint(1, 3)):
        row: Row = [text(draw.randint(1, 5), draw.randint(1, 9))]
        for _ in range(draw.randint(0, 3)):
            video = draw.random() < 0.3
            row.append(
                family.video(2 * draw.randint(1, 3)) if video else family.image(draw.randrange(3))
            )
            if draw.random() < 0.6:
                row.append(text(draw.randint(1, 4), draw.randint(1, 9)))
        rows.append([*row, text(draw.randint(2, 6), 3)])
    if not any(isinstance(item, Media) for row in rows for item in row):
        rows[0].insert(1, family.image(0))
    return rows


@contextlib.contextmanager
def found_spans(model: nn.Module) -> Iterator[Callable[[], list[list[VisualSpan]]]]:
    """Patch a model inside the block; the function that it gives tells what the last call found."""
    with tokencomp.patch(model, 0.3, reducer="uniform", strict=True) as handle, torch.no_grad():
        yield lambda: handle.stats.spans


def embedded(family: Family, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt as embeddings with the features in place, and what tells where they stand."""
    seen = {"inputs_embeds": oracle.decoder_inputs(model, family, inputs)["inputs_embeds"]}
    ids = inputs["input_ids"]
    seen["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    seen["position_ids"] = family.positions(model, inputs)
    kept = {k: v for k, v in inputs.items() if k == "attention_mask" or k.endswith("_grid_thw")}
    return {**seen, **kept}


def encoded(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The prompt with features in place of pixels, encoded by the unpatched model."""
    inputs, features = dict(inputs), {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in inputs:
            encode = getattr(model.model, f"get_{kind}_features")
            names = [n for n in inspect.signature(encode).parameters if n in inputs]
            with torch.no_grad():
                features[kind] = encode(**{n: inputs[n] for n in names}, return_dict=True)
            del inputs[pixels]
    return {**inputs, ENCODED: features}


@pytest.mark.parametrize("seed", range(3))
def test_random_batches(family: Family, seed: int) -> None:
    model, rows = family.build(), random_rows(family, seed)
    with found_spans(model) as spans:
        model(**family.batch(rows))
        assert spans() == expectations(rows)


def test_videos_beside_images(family: Family) -> None:
    rows = [
        [text(2), family.video(4), family.video(2), text(1), family.image(2), text(3)],
        [family.image(1), family.video(6), text(9)],
    ]
    model = family.build()
    with found_spans(model) as spans:
        model(**family.batch(rows))
        assert spans() == expectations(rows)


def test_packed(family: Family) -> None:
    model = family.build()
    rows = [
        [text(3), family.image(0), family.image(1), text(9, 3)],
        [text(5, 8), family.image(2), text(4, 5)],
        [text(4, 9)],
    ]
    with found_spans(model) as spans:
        model(**pack(family, model, rows))
        assert spans() == [expected([item for row in rows for item in row], 0)]


def test_features_in_place(family: Family) -> None:
    """Types say where they stand; a prompt of other media ran before."""
    model = family.build()
    rows = [
        [text(3), family.image(0), text(2), family.image(2), text(9, 3)],
        [text(6), family.video(4), text(2)],
    ]
    inputs = family.batch(rows)
    given = embedded(family, model, inputs)
    other = family.batch([[text(2), family.image(1), family.image(1), text(3)]])
    with found_spans(model) as spans:
        model(**other)
        model(**given)
        assert spans() == expectations(rows)


def test_encoded_by_generate(family: Family) -> None:
    model, rows = family.build(), random_rows(family, 11)
    with found_spans(model) as spans:
        model.generate(**family.batch(rows), max_new_tokens=1)
        assert spans() == expectations(rows)


def test_encoded_before_the_patch(family: Family) -> None:
    model, rows = family.build(), random_rows(family, 12)
    if ENCODED not in inspect.signature(model.forward).parameters:
        pytest.skip("the release encodes media inside of the model alone")
    inputs = encoded(model, family.batch(rows))
    other = family.batch([[text(2), family.image(1), family.image(1), text(3)]])
    with found_spans(model) as spans:
        model(**other)
        model(**inputs)
        assert spans() == expectations(rows)
