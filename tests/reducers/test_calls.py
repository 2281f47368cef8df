"""How many device calls a reducer makes does not depend on how many spans a batch has."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.calls import measure, tiny_model
from tokencomp.reducers._batch import means

FEW, MANY, MORE = 2, 16, 6  # prompts, and further calls that are allowed


@pytest.mark.parametrize("reducer", ["uniform", "cdpruner"])
def test_calls_that_a_prefill_adds_do_not_grow_with_the_batch(reducer: str) -> None:
    """With what the engine does for a reducer, such as finding the text of every prompt."""
    model = tiny_model(layers=2)
    few, many = (measure(model, reducer, 2, prompts)[0].calls for prompts in (FEW, MANY))
    assert few > 0 and many <= few + MORE


@pytest.mark.parametrize("lengths", [[1], [5], [16, 17, 1], [300, 2, 256]])
def test_means_of_texts(lengths: list[int]) -> None:
    """Against a loop; bit by bit for texts alone, so that no choice depends on other prompts."""
    x = torch.randn(sum(lengths), 24)
    texts, together = x.split(lengths), means(x, lengths)
    want = torch.stack([text.double().mean(0).float() for text in texts])
    torch.testing.assert_close(together, want, atol=1e-6, rtol=1e-5)
    assert torch.equal(together, torch.cat([means(text, [len(text)]) for text in texts]))
