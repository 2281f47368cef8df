"""The selector: network, training, weights, reducer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import Family, text

import tokencomp
from benchmarks.accuracy.studies.oracle import Oracle, truth
from tokencomp.errors import ScoreError
from tokencomp.reducers.selector import load_selector
from tokencomp.training.capture import capture
from tokencomp.training.data import load_batch, questions


def test_attention_row_equals_the_eager_map_of_layer_zero(family: Family) -> None:
    """Mean over heads and user rows of the full softmax, answers left out, padded batch."""
    model = family.build("eager")
    rows = [[text(3), family.image(), text(6), [5, 6]], [family.video(), text(4), [8, 9]]]
    inputs = family.batch(rows)
    got = capture(model, inputs, layers=False).attention_rows(answer=2)
    for b, row in enumerate(rows):
        alone = family.batch([row])
        weights = model(**alone, output_attentions=True).attentions[0][0].mean(0)
        for scores, (start, stop, voters) in zip(
            got[b], _spans(model, alone, len(weights) - 2), strict=True
        ):
            expected = weights[voters][:, start:stop].mean(0)
            torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


def _spans(model: Any, inputs: Any, stop: int) -> list[tuple[int, int, list[int]]]:
    found = []
    spans = capture(model, inputs, layers=False).spans[0]
    visual = {c for s in spans for c in range(s.start, s.stop)}
    for span in spans:
        voters = [i for i in range(span.stop, stop) if i not in visual]
        found.append((span.start, span.stop, voters))
    return found


def test_the_reducer_follows_the_network(trained: Path, tiny: Any, data: str) -> None:
    """Kept tokens are the top of the network's logits on the row that training saw."""
    model, processor = tiny
    inputs, _ = load_batch([questions(data, "image", 1)[0]], processor, 8)
    row = capture(model, inputs, layers=False).attention_rows(0)[0][0]
    with torch.no_grad():
        wanted = load_selector(trained)[0](row[None])[0].topk(4).indices.sort().values
    weights = str(trained.parent)
    with tokencomp.patch(model, 5 / 9, reducer="selector", weights=weights) as handle:
        model(**inputs)
        assert handle.stats.kept(0)[0][0] == wanted.tolist()
        assert handle.stats.ratio == pytest.approx(5 / 9)


def test_oracle_keeps_the_relevant_tokens_or_says_what_is_missing(family: Family) -> None:
    model = family.build()
    inputs = family.batch([[text(4), family.video(), text(5)], [family.image(), text(3)]])
    spans = capture(model, inputs, layers=False).spans
    relevance = [[torch.rand(math.prod(s.grid)) for s in row] for row in spans]
    with tokencomp.patch(model, 0.5, reducer=Oracle()) as handle:
        with truth(relevance):
            model(**inputs)
        for b, row in enumerate(spans):
            for j, span in enumerate(row):
                kept = handle.stats.kept(b)[0][j]
                fixed = [*span.special, *span.text]
                patches = [i for i in range(span.length) if i not in fixed]
                best = relevance[b][j].topk(len(kept) - len(fixed)).indices.tolist()
                assert set(kept) == {*fixed, *(patches[i] for i in best)}
        with pytest.raises(ScoreError, match="truth"):
            model(**inputs)
