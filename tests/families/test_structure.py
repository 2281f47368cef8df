"""Parts, spans and grids by structure; signals of every family; tiny models see images."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support import plans
from support.families import FAMILIES, IMAGE, START, Family, text
from support.family.hybrid import HYBRID
from support.family.llava import LlavaOnevision
from support.family.mistral import Mistral3
from support.family.structural import STRUCTURAL

import tokencomp
from tokencomp.adapters.base import per_medium, sizes_in, token_counts
from tokencomp.adapters.registry import adapter_for, available_models
from tokencomp.adapters.retrieval import ColPaliAdapter, ColQwen2Adapter
from tokencomp.adapters.structural import (
    Medium,
    _joined,
    cut_media,
    grid_from_positions,
    grid_from_size,
)
from tokencomp.adapters.structure import find_parts
from tokencomp.errors import (
    OptionError,
    UnknownGridError,
)
from tokencomp.plan.plan import Plan, Stage
from tokencomp.reducers.base import Reducer
from tokencomp.reducers.uniform import Uniform
from tokencomp.tokens.signals import QUERY, Attention
from tokencomp.tokens.tokens import Kept, Tokens
from tokencomp.torchlib import compat

MISTRAL = hasattr(transformers, "Ministral3Config")
needs_mistral = pytest.mark.skipif(not MISTRAL, reason="the release has no Ministral 3")


def test_parts_of_a_family_are_found_by_structure() -> None:
    model = LlavaOnevision().build()
    parts = find_parts(model)
    assert parts.top is model
    assert parts.body is model.model
    assert parts.decoder is model.model.language_model


@needs_mistral
def test_signals_of_the_tower_are_refused() -> None:
    model = Mistral3().build()
    with pytest.raises(OptionError, match="vision tower"):
        tokencomp.patch(model, 0.5, reducer=plans.TowerTop())


@needs_mistral
def test_an_unknown_grid_is_refused_by_reducers_that_read_places() -> None:
    family = Mistral3()
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(5)]])
    inputs["input_ids"][inputs["input_ids"] == 154] = 20  # rows do not look like one image
    ids = inputs["input_ids"][0].tolist()
    ids.insert(ids.index(IMAGE) + 5, START)  # nor are they equally long
    inputs = {**inputs, "input_ids": torch.tensor([ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="pool") as handle:
        with pytest.raises(UnknownGridError, match="pool"):
            model(**inputs)
        handle.set(reducer="divprune")
        model(**inputs)
        assert not any(s.grid_known for s in handle.stats.spans[0])


def test_features_in_place_have_no_sizes_of_another_prompt() -> None:
    """The model encoded another image of as many tokens before."""
    if "kimi_k25" not in STRUCTURAL:
        pytest.skip("the release has no Kimi K2.5")
    family = STRUCTURAL["kimi_k25"]
    model = family.build()
    inputs = family.batch([[text(3), family.image(1), text(5)]])
    types = (inputs["input_ids"] == IMAGE).int()
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        model(**inputs)
        assert [s.grid for s in handle.stats.spans[0]] == [(1, 2, 4)]
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        model(inputs_embeds=embeds, mm_token_type_ids=types)
        assert not any(s.grid_known for s in handle.stats.spans[0])


def test_media_are_cut_out_of_runs() -> None:
    """Adjacent images, an image in rows, and counts that do not fit."""
    rows = [[(2, 8, "image"), (9, 12, "image")], [(0, 4, "image"), (5, 9, "image")]]
    media = cut_media(rows, {"image": [2, 4, 3, 8]})
    assert media == [
        [Medium("image", [(2, 4)]), Medium("image", [(4, 8)]), Medium("image", [(9, 12)])],
        [Medium("image", [(0, 4), (5, 9)])],
    ]
    assert cut_media(rows, {"image": [2, 4, 3, 7]}) is None
    assert cut_media(rows, {"image": [2, 4, 3, 8, 1]}) is None
    mixed = cut_media([[(0, 2, "audio"), (3, 5, "image"), (5, 9, "audio")]], {"image": [2]})
    assert [m.modality for m in mixed[0]] == ["audio", "image", "audio"]
    for counts in ({"video": [4], "audio": [2]}, {"video": [4]}):
        assert cut_media([[(0, 2, "video"), (2, 4, "audio")]], counts) is None


def test_line_breaks_are_everywhere_the_same_token() -> None:
    """Other single tokens between runs are text, which belongs to no picture."""
    medium = Medium("image", [(0, 2), (3, 5), (6, 8)])
    tokens = torch.tensor([[0, 1, 9, 2, 3, 9, 4, 5], [0, 1, 9, 2, 3, 8, 4, 5]])
    embeds = torch.eye(10)[tokens]
    broken = _joined(medium, embeds[0], None, lambda: None)
    assert broken is not None and (broken.grid, broken.special) == ((1, 3, 2), (2, 5))
    assert _joined(medium, embeds[1], None, lambda: None) is None


@pytest.mark.parametrize(
    ("size", "count", "grid"),
    [
        ((1, 8, 12), 24, (1, 4, 6)),  # patches, merged 2 × 2
        ((4, 4, 6), 24, (4, 2, 3)),  # frames stay
        ((4, 4, 6), 6, (1, 2, 3)),  # frames are pooled
        ((1, 56, 84), 6, (1, 2, 3)),  # pixels
        ((1, 5, 7), 12, (1, 3, 4)),  # partial blocks at the edge
        ((1, 8, 12), 25, None),
        (None, 24, None),
    ],
)
def test_grid_from_size(size, count: int, grid) -> None:
    assert grid_from_size(size, count) == grid


def test_grid_from_positions() -> None:
    raster = np.arange(6)
    positions = np.stack([np.full(6, 3), 3 + raster // 3, 3 + raster % 3])[:, None]

    assert grid_from_positions(positions, 0, 0, 6) == (1, 2, 3)
    alike = np.stack([raster] * 3)[:, None]
    assert grid_from_positions(alike, 0, 0, 6) is None  # one position per token
    assert grid_from_positions(positions, 0, 1, 6) is None
    assert grid_from_positions(None, 0, 0, 6) is None


def test_sizes_and_token_counts() -> None:
    assert sizes_in(torch.tensor([[1, 4, 6], [2, 8, 8]])) == [(1, 4, 6), (2, 8, 8)]
    assert sizes_in(torch.tensor([[32, 48]])) == [(1, 32, 48)]
    assert sizes_in([[32, 48], [16, 16]]) == [(1, 32, 48), (1, 16, 16)]
    places = torch.tensor([[[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [-1, -1]]])  # (x, y)
    assert sizes_in(places) == [(1, 2, 3)]
    assert sizes_in(torch.zeros(2, 3)) == sizes_in(torch.zeros(2, 3).bool()) == sizes_in(5) == []
    assert per_medium([(1, 8, 8), (1, 4, 8)], [16, 8]) == [(1, 8, 8), (1, 4, 8)]
    assert per_medium([(1, 8, 8)] * 5, [32, 48]) == [(2, 8, 8), (3, 8, 8)]  # frames of two videos
    assert per_medium([(1, 8, 8)] * 5, [32, 47]) == per_medium([(1, 8, 8)] * 4, [20, 12]) == []
    assert per_medium([(1, 8, 8), (1, 4, 8)], [24]) == per_medium([(1, 8, 8)], []) == []
    assert token_counts([torch.zeros(4, 8), torch.zeros(6, 8)]) == [4, 6]
    assert token_counts(torch.zeros(3, 5, 8)) == [5, 5, 5]
    assert token_counts(torch.zeros(5, 8)) == []  # of all images together
    assert token_counts(torch.zeros(5, 1, 8)) == []  # patch by patch
    assert token_counts((torch.zeros(2, 5, 8), torch.zeros(7, 8))) == [5, 5, 7]


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


EVERY = {**FAMILIES, **HYBRID, **STRUCTURAL}


@pytest.mark.parametrize("name", EVERY)
def test_patches_and_images_differ(name: str) -> None:
    """No two patches have one direction: a test of selection on equal patches could not fail."""
    family = EVERY[name]
    model, seen = family.build(), []
    inputs = family.batch([[text(3), family.image(0), text(4)] for _ in range(3)])

    def note(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["inputs_embeds"])

    family.decoder(model).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        with tokencomp.patch(model, 0.5) as handle:
            model(**inputs)
    kept = [handle.stats.kept(b)[0] for b in range(3)]
    assert kept[0] != kept[1] != kept[2] != kept[0]
    for span in handle.stats.spans[0]:
        offsets = sorted({*range(span.length)} - {*span.special, *span.text})
        patches = torch.nn.functional.normalize(seen[0][0, span.start : span.stop][offsets], dim=1)
        cosines = patches @ patches.T - torch.eye(len(patches))
        assert cosines.max() < 0.999
