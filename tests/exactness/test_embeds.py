"""Features that already stand in `inputs_embeds`, and placeholders that stand for nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import oracle
from support.families import CORE, FAMILIES, VIDEO, Family, text
from torch import Tensor, nn

import tokencomp
from tokencomp.adapters.qwen import modalities_from_grids
from tokencomp.errors import NoVisualInputError, OptionError, UncompressedWarning

FAMILY_NAMES = CORE


def embedded(family: Family, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt as embeddings with the features in place, read at the unpatched decoder."""
    embeds = oracle.decoder_inputs(model, family, inputs)["inputs_embeds"]
    where = {"position_ids": family.positions(model, inputs)}
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **where}


def test_compressed_where_types_tell_the_places(family: Family) -> None:
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)], [text(6)]])
    given = embedded(family, model, inputs)
    position = {"position_ids": given["position_ids"]}
    types = (inputs["input_ids"] == 150).int() + 2 * (inputs["input_ids"] == VIDEO).int()
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform", strict=True) as handle:
        expected = model(**inputs, **position).logits
        kept = [handle.stats.kept(b) for b in range(2)]
        got = model(**given, mm_token_type_ids=types).logits
        assert [handle.stats.kept(b) for b in range(2)] == kept and handle.stats.ratio > 0.4
    if family.name != "qwen3_vl":  # its deepstack features come beside the embeddings
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision", "qwen2_vl", "vila"])
def test_videos_whose_pixels_the_call_does_not_bring(name: str) -> None:
    """Every frame has its place in the grid, as where the pixels come along."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.batch([[text(3), family.video(4), text(9, 3)], [text(6)]])
    given = embedded(family, model, inputs)
    types = 2 * (inputs["input_ids"] == VIDEO).int()
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="vidcom2") as handle:
        expected = model(**inputs, position_ids=given["position_ids"]).logits
        spans, kept = handle.stats.spans[0], handle.stats.kept(0)
        got = model(**given, mm_token_type_ids=types).logits
        assert (handle.stats.spans[0], handle.stats.kept(0)) == (spans, kept)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl", "qwen2_vl"])
def test_generate_takes_types_beside_embeddings(name: str, beams: int) -> None:
    """Also where the model itself takes none; beams repeat the rows of the caller."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)], [text(2), family.image(1)]])
    given = embedded(family, model, inputs)
    types = (inputs["input_ids"] == 150).int()
    options = {"max_new_tokens": 4, "num_beams": beams, "suppress_tokens": [150, 151]}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    if name != "qwen2_vl":
        del given["position_ids"]
    with tokencomp.patch(model, 0.5, reducer="uniform", strict=True) as handle:
        expected = model.generate(**inputs, **options)
        kept = [handle.stats.kept(b) for b in range(2)]
        got = model.generate(**given, mm_token_type_ids=types, **options)
        assert [handle.stats.kept(b) for b in range(2)] == kept and handle.stats.ratio > 0.4
    for here, there in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


def test_types_of_a_later_turn_are_those_of_its_columns() -> None:
    """`generate` hands the body the new columns alone: 16 tokens of an image, of which 8 stay."""
    family = FAMILIES["llava"]
    model = family.build()
    options = {"max_new_tokens": 1, "return_dict_in_generate": True}
    turns = [text(3), family.image(0), text(4, 3), family.image(1), text(5, 5)]
    past: dict[str, Any] = {}
    rows = []
    with tokencomp.patch(model, 0.5, reducer="uniform", strict=True):
        for stop in (3, 5):
            inputs = family.batch([turns[:stop]])
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
            types = (inputs["input_ids"] == 150).int()
            out = model.generate(**given, **past, mm_token_type_ids=types, **options)
            past = {oracle.cache_name(out): oracle.cache_of(out)}
            held = int(oracle.cache_of(out).layers[0].keys.shape[2])
            rows.append(embeds.shape[1] - held)
        with pytest.raises(OptionError, match=r"mm_token_type_ids of shape \(1, 2\) with"):
            model.generate(**given, mm_token_type_ids=torch.ones(1, 2), **options)
    assert rows == [8, 16]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_compressed_where_grids_tell_the_places(name: str) -> None:
    """M-RoPE positions and grids say where images and videos stand."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.batch(
        [[text(3), family.image(0), text(9, 3), family.image(1)], [text(2), family.video(4)]]
    )
    given = embedded(family, model, inputs)
    grids = {k: v for k, v in inputs.items() if k.endswith("_grid_thw")}
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform", strict=True) as handle:
        model(**inputs, position_ids=given["position_ids"])
        expected = [(handle.stats.spans[b], handle.stats.kept(b)) for b in range(2)]
        model(**given, **grids)
        assert [(handle.stats.spans[b], handle.stats.kept(b)) for b in range(2)] == expected


def test_grids_tell_the_places_where_media_meet_and_a_prompt_ends_in_one() -> None:
    """Two images without a word before, between and behind them."""
    raster = [torch.cartesian_prod(*map(torch.arange, (1, 2, 3))).T] * 2
    positions = torch.cat([raster[0], raster[1] + 3], 1)
    for count in (1, 2):
        given = positions[:, None, : 6 * count]
        kinds = modalities_from_grids(given, {"image": [(1, 2, 3)] * count})
        assert kinds is not None and kinds.tolist() == [[1] * 6 * count]
    # Words have the positions of an image of one token, which is not found.
    assert modalities_from_grids(torch.arange(5).expand(3, 1, 5), {"image": [(1, 1, 1)]}) is None


@pytest.mark.parametrize("missing", ["places", "pixels"])
def test_a_warning_where_nothing_tells(family: Family, missing: str) -> None:
    """Features at unknown columns of embeddings, and placeholders without features."""
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)]])
    given = embedded(family, model, inputs)
    if missing == "pixels":
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    match = "mm_token_type_ids" if missing == "places" else "placeholders"
    with torch.no_grad(), tokencomp.patch(model, 0.5) as handle:
        with pytest.warns(UncompressedWarning, match=match):
            model(**given)
        assert not handle.stats
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**given)  # once per patch
            model(**inputs)
    with (
        tokencomp.patch(model, 0.5, strict=True),
        pytest.raises(NoVisualInputError, match="mm_token_type_ids"),
    ):
        model(**given)
    with warnings.catch_warnings(), tokencomp.patch(model, 0.0):
        warnings.simplefilter("error")
        model(**given)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_a_placeholder_without_features_is_text(name: str) -> None:
    """A stray video token in a question about an image."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), [*text(4, 3), VIDEO, *text(4, 4)]]])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 150).int()
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        model(**inputs)
        assert [span.modality for span in handle.stats.spans[0]] == ["image"] * len(
            handle.stats.spans[0]
        )
        out = model.generate(**inputs, max_new_tokens=3)
    assert out.shape[1] > inputs["input_ids"].shape[1]
