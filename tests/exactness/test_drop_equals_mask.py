"""Dropping tokens gives the logits of the full-length run that masks them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import FAMILIES, IMAGE, VIDEO, Family, text
from support.family.structural import STRUCTURAL

import tokencomp

FAMILY_NAMES = sorted(FAMILIES)
# Of every image and video that the structural adapter finds in `prompts`.
GRIDS = {
    "glm4v": [[(1, 4, 4), (1, 2, 4)], [(1, 2, 4), (1, 2, 4), (1, 3, 5)]],
    "paddleocr_vl": [[(1, 4, 4), (1, 2, 4)], [(1, 2, 4), (1, 2, 4), (1, 3, 5)]],
    "kimi_k25": [[(1, 4, 4), (1, 2, 4)], [(1, 2, 4), (1, 3, 5), (1, 3, 5)]],
    "mistral3": [[(1, 4, 6), (1, 2, 3)], [(1, 2, 3), (1, 5, 2), (1, 5, 2)]],
    "fast_vlm": [[(1, 4, 6), (1, 4, 6)], [(1, 4, 6)] * 3],
    "qwen3_omni_moe_thinker": [[(1, 4, 4), (1, 2, 4)], [(2, 2, 4), (1, 3, 5)]],
    "qwen2_5_omni_thinker": [[(1, 4, 4), (1, 2, 4)], [(2, 2, 4), (1, 3, 5)]],
}
# Most of the thinker of Qwen3-Omni is that of Qwen2.5-Omni, and the tower of Qwen3-VL.
TWIN = "qwen3_omni_moe_thinker"


def prompts(family: Family) -> dict[str, torch.Tensor]:
    """Ragged: several images, image + video, text only."""
    return family.batch(
        [
            [text(3), family.image(0), text(2, 2), family.image(1), text(7, 3)],
            [family.video(4), text(3, 4), family.image(2), text(4, 5)],
            [text(12, 6)],
        ]
    )


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", plans.NAMES)
def test_prefill_and_decode(family: Family, backend: str, name: str) -> None:
    model, inputs = family.build(backend), prompts(family)
    plan = plans.make(name, family.layers)
    _, out, masks = oracle.generated(model, family, inputs, plan=plan)
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5
    assert sum(int(m.sum()) for m in masks) < family.layers * int(inputs["attention_mask"].sum())


# PyramidDrop scores by the layer behind a stage, which may read positions beside the rotary tables.
@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "reducer", [pytest.param(plans.RELEVANT, id="condiv"), "divprune", "prune", "pyramiddrop"]
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n == TWIN else n for n in STRUCTURAL]
)
def test_families_without_a_file_of_their_own(name: str, reducer: Any) -> None:
    """Through `generate`, which encodes ahead of the model, with grids known."""
    family = STRUCTURAL[name]
    model, inputs = family.build(), prompts(family)
    handle, out, masks = oracle.generated(model, family, inputs, ratio=0.5, reducer=reducer)
    spans = handle.stats.spans
    assert [[s.grid for s in row] for row in spans] == [*GRIDS[name], []]
    assert all(s.grid_known for row in spans for s in row)
    if name == "mistral3":  # line breaks between the rows of an image
        breaks = [tuple(6 + 7 * i for i in range(3)), (3,)]
        assert [span.special for span in spans[0]] == breaks
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5


@pytest.mark.parametrize("name", [n for n in ("glm4v", "kimi_k25") if n in STRUCTURAL])
def test_videos_with_times_between_frames(name: str) -> None:
    """One span with text in it at placeholders of images (GLM), or one per two frames (Kimi)."""
    family: Any = STRUCTURAL[name]
    model = family.build()
    rows = [[text(3), family.whole_video(4), text(5)], [text(9), family.whole_video(4), text(7)]]
    inputs = family.batch(rows)
    if name == "glm4v":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int() * 2
    handle, out, masks = oracle.generated(model, family, inputs, ratio=0.5, reducer="uniform")
    spans = [[(s.modality, s.grid, s.text) for s in row] for row in handle.stats.spans]
    joined = [("video", (2, 2, 4), (8, 9, 10))]
    assert spans == [joined if name == "glm4v" else [("video", (1, 2, 4), ())] * 2] * 2
    assert handle.stats.tokens_after == [[8] * 4] * 2
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "internvl", "vila"])
def test_adjacent_videos(name: str) -> None:
    """Two clips without text between them are two spans, beside a prompt with one clip."""
    family = FAMILIES[name]
    rows = [
        [text(3), family.video(4), family.video(4), text(4, 5)],
        [text(2), family.video(4), text(9, 3)],
    ]
    model, inputs = family.build(), family.batch(rows)
    handle, out, masks = oracle.generated(model, family, inputs, 2, ratio=0.6, reducer="kcenter")
    lengths = [[span.length for span in row] for row in handle.stats.spans]
    assert len({*lengths[0], *lengths[1]}) == 1 and len(lengths[0]) == 2 * len(lengths[1])
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["entry", "attention", "vanish"])
def test_outputs_have_full_length(family: Family, name: str) -> None:
    """Logits and hidden states have every column; one that left repeats what it follows.

    Each layer's states are those of its own tokens, whatever `logits_to_keep` says.
    """
    model, inputs = family.build(), prompts(family)
    call = {"use_cache": False, "output_hidden_states": True}
    with tokencomp.patch(model, plan=plans.make(name, family.layers)) as handle, torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        states = model(**inputs, **call, logits_to_keep=1).hidden_states
        masks = oracle.kept_columns(handle, inputs, family.layers)
    with torch.no_grad(), oracle.masked(model, family, masks):
        full = model(**inputs, **call, position_ids=family.positions(model, inputs))
    assert logits.shape == full.logits.shape
    assert oracle.difference(logits, oracle.repeated(full.logits, masks[-1])) < 1e-5
    for layer, (mine, theirs) in enumerate(zip(states, full.hidden_states, strict=True)):
        left = masks[max(layer - 1, 0)]
        assert oracle.difference(mine[left], theirs[left]) < 1e-5, f"layer {layer}"
        assert mine.shape == theirs.shape


def test_labels(family: Family) -> None:
    """The loss is that of the masked run, at a caption right after an image as well."""
    model, inputs = family.build(), prompts(family)
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    labels = inputs["input_ids"].masked_fill(visual | (inputs["attention_mask"] == 0), -100)
    with tokencomp.patch(model, plan=plans.make("both", family.layers)) as handle, torch.no_grad():
        loss = model(**inputs, labels=labels).loss
        masks = oracle.kept_columns(handle, inputs, family.layers)
    logits = oracle.masked_logits(model, family, inputs, masks)
    # a label right behind dropped tokens is predicted from the last that is left before them
    targets, scores = labels[:, 1:], oracle.repeated(logits, masks[-1])[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        scores.flatten(0, 1), targets.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_merged_features(family: Family) -> None:
    """A merging reducer equals the masked run whose kept embeddings were replaced."""
    model, inputs = family.build(), prompts(family)
    handle, out, masks = oracle.generated(model, family, inputs, ratio=0.6, reducer="bipartite")
    stats, reducer = handle.stats, tokencomp.make_reducer("bipartite")

    def replace(module, args, kwargs):
        x = kwargs["inputs_embeds"].clone()
        for b, row in enumerate(stats.spans):
            for span, offsets in zip(row, stats.kept(b)[0], strict=True):
                columns = (~span.special_mask()).nonzero()[:, 0] + span.start
                budget = len(offsets) - (span.length - len(columns))
                merged = reducer.reduce(tokencomp.Tokens(x[b, columns], [span.grid], [budget]))
                x[b, columns[merged.patches]] = merged.features
        return args, {**kwargs, "inputs_embeds": x}

    with family.decoder(model).register_forward_pre_hook(replace, with_kwargs=True):
        assert oracle.deviation(model, family, inputs, out, masks) < 1e-5
