"""What `tokencomp list models` says of a family is what a patched model of it does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from support.families import FAMILIES, Family, text

import tokencomp
from tokencomp.adapters.registry import adapter_for, available_models
from tokencomp.adapters.retrieval import ColPaliAdapter, ColQwen2Adapter
from tokencomp.plan.plan import Plan
from tokencomp.plan.stages import Stage
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.uniform import Uniform
from tokencomp.tokens.kept import Kept
from tokencomp.tokens.signals import QUERY, Attention
from tokencomp.tokens.tokens import Tokens
from tokencomp.torchlib import compat

FAMILY_NAMES = sorted(FAMILIES)

CI = Path(__file__).parents[2] / ".ci" / "run"


@dataclass(frozen=True)
class Asking(Reducer):
    """Asks for every signal and keeps what it was given."""

    seen: list[Tokens] = field(default_factory=list, hash=False, compare=False)

    @property
    def needs(self):
        return frozenset({QUERY, Attention("text")})

    def reduce(self, tokens: Tokens) -> Kept:
        self.seen.append(tokens)
        return Uniform().reduce(tokens)


def test_signals_and_stages(family: Family) -> None:
    """Every listed signal arrives, at entry and at the earliest layer stage."""
    model = family.build()
    adapter = adapter_for(model)
    entry, layer = Asking(), Asking()
    stages = Stage(0, 0.8, entry), Stage(adapter.first_layer_stage, 0.5, layer)
    inputs = family.batch([[text(3), family.image(0), text(5)]])
    with torch.no_grad(), tokencomp.patch(model, plan=Plan(stages)):
        model(**inputs, use_cache=False)
    words = model.get_input_embeddings()(inputs["input_ids"][0, -5:])
    assert set(adapter.signals) == {"query", "attention", "frames", "tower"}  # see test_tower.py
    for reducer_spy in (entry, layer):
        assert reducer_spy.seen
        for tokens in reducer_spy.seen:
            n, width = tokens.features.shape
            assert n > 1 and width == words.shape[1] and tokens.features.std() > 0
            assert tokens.scores.shape == (n,) and tokens.scores.isfinite().all()
            assert (tokens.scores > 0).any()
    for tokens in entry.seen:
        assert torch.equal(tokens.queries[0][-5:], words)  # end marks of the image may precede
    assert sum(len(t.features) for t in layer.seen) < sum(len(t.features) for t in entry.seen)


def test_tested_releases_are_those_of_ci() -> None:
    run = CI.read_text()
    older = re.search(r"for version in (.*); do", run)[1].split()
    chosen = set(re.search(r'tests/exactness -k "(.*)"', run)[1].replace("[", "").split(" or "))
    *before, newest = releases = compat.RELEASES
    assert before == older
    assert all(set(releases[release]) == chosen for release in older)
    assert releases[newest] is None
    assert compat.tested_with("qwen2_vl") == [*older, newest]
    assert compat.tested_with("qwen3_vl") == [*older, newest]
    assert compat.tested_with("internvl") == [newest]


def test_the_exactness_suite_has_every_family() -> None:
    """So that "all" is true of the newest release."""
    covered = {type(adapter_for(FAMILIES[name].build())) for name in FAMILIES}
    retrieval = {ColPaliAdapter, ColQwen2Adapter}  # see test_bodies.py
    assert set(available_models().values()) == covered | retrieval


def test_listed_stages() -> None:
    """Three decoder layers of Qwen3-VL get vision features in the default configuration."""
    from tokencomp.cli.list import stages

    assert [stages(name) for name in ("qwen3_vl", "vila")] == [
        "entry, layers >= 3", "entry, layers >= 1",
    ]  # fmt: skip
