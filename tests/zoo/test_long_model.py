"""The packaged model that writes long answers: right facts, a card from its metrics, its size."""

import pytest

from recipes.long.card import render
from recipes.long.evaluate import answers, scores
from tokencomp import zoo
from tokencomp.zoo.shapesqa.long_scenes import FAMILIES, item

NAME = "tiny-qwen3-vl-long"


@pytest.mark.parametrize("each", [2, pytest.param(10, marks=pytest.mark.long)])
def test_facts_of_scenes_it_was_never_trained_on(each):
    """Written by `generate`, read back by the parser; guessed places and words are rarely right."""
    items = [item("validation", kind, k) for kind in FAMILIES for k in range(each)]
    found = scores(items, answers(*zoo.load(NAME), items, each))
    right = sum(one["right"] * one["facts"] for one in found.values())
    assert right >= 0.7 * sum(one["facts"] for one in found.values()), found


def test_card_is_generated():
    folder, metrics = zoo.model_path(NAME), zoo.metrics(NAME)
    assert (folder / "README.md").read_text() == render(metrics)
    model, _ = zoo.load(NAME)
    count = sum(p.numel() for p in model.parameters())
    assert count == round(metrics["model"]["parameters"] * 1e6)
    assert {*metrics["facts"]} == {*FAMILIES}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8e6
