"""Models without a file of their own: parts, spans and grids by structure, and exactness."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import plans
from support.families import IMAGE, START, text
from support.family.llava import LlavaOnevision
from support.family.mistral import Mistral3
from support.family.qwen import Qwen2VL
from support.family.structural import STRUCTURAL

import tokencomp
from tokencomp.adapters.encoded import per_medium, sizes_in, token_counts
from tokencomp.adapters.media_call import MediaCall
from tokencomp.adapters.spans import Medium, _joined, cut_media, grid_from_size
from tokencomp.adapters.structure import find_parts
from tokencomp.errors import (
    NoDecoderError,
    NoPlaceholderError,
    OptionError,
    UnknownGridError,
    UnverifiedModelError,
)

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


def tiny_clip() -> dict[str, dict[str, int]]:
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return {
        "text_config": {**sizes, "vocab_size": 8},
        "vision_config": {**sizes, "image_size": 8, "patch_size": 4},
    }


def test_refusals_name_the_reason() -> None:
    llama = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(NoPlaceholderError, match="no placeholder"):
        tokencomp.patch(transformers.LlamaForCausalLM(llama))
    clip = transformers.CLIPModel(transformers.CLIPConfig(**tiny_clip()))
    family = Qwen2VL()
    for model in (clip, clip.vision_model, family.build().model.visual):
        with pytest.raises(NoDecoderError, match="no text decoder"):
            tokencomp.patch(model)
    t5 = transformers.T5Config(
        vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(NoDecoderError, match=r"encoder-decoder|no text decoder"):
        tokencomp.patch(transformers.T5ForConditionalGeneration(t5))


def test_a_type_nobody_has_checked_is_refused() -> None:
    model = LlavaOnevision().build()
    model.config.model_type = "new_type"
    with pytest.raises(UnverifiedModelError, match="verify=True"):
        tokencomp.patch(model)


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
    assert cut_media([[(0, 2, "video"), (2, 4, "audio")]], {"video": [4], "audio": [2]}) is None


def test_line_breaks_are_everywhere_the_same_token() -> None:
    """Other single tokens between runs are text, which belongs to no picture."""
    medium = Medium("image", [(0, 2), (3, 5), (6, 8)])
    tokens = torch.tensor([[0, 1, 9, 2, 3, 9, 4, 5], [0, 1, 9, 2, 3, 8, 4, 5]])
    call: Any = SimpleNamespace(embeds=torch.eye(10)[tokens], raster=lambda *place: None)
    broken = _joined(medium, 0, call, lambda: None)
    assert broken is not None and (broken.grid, broken.special) == ((1, 3, 2), (2, 5))
    assert _joined(medium, 1, call, lambda: None) is None


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

    def grid(positions, start: int):
        call = MediaCall(torch.zeros(1, 6), torch.zeros(1, 6, 1), positions, torch.nn.Module())
        return call.raster(0, start, 6)

    assert grid(positions, 0) == (1, 2, 3)
    assert grid(np.stack([raster] * 3)[:, None], 0) is None  # one position per token
    assert grid(positions, 1) is None
    assert grid(None, 0) is None


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
