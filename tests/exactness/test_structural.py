"""Whole models with real towers that no file of the package knows by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import IMAGE, VIDEO, Family, text
from support.family.structural import STRUCTURAL

import tokencomp

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
TWINS = ("qwen3_omni_moe_thinker",)
NAMES = [pytest.param(n, marks=pytest.mark.long) if n in TWINS else n for n in STRUCTURAL]


@pytest.fixture(params=NAMES)
def served(request: pytest.FixtureRequest) -> Family:
    return STRUCTURAL[request.param]


def prompts(family: Family) -> dict[str, Any]:
    """Ragged: several images, images side by side or a video, text only."""
    return family.batch(
        [
            [text(3), family.image(0), text(2, 2), family.image(1), text(7, 3)],
            [family.video(4), text(3, 4), family.image(2), text(4, 5)],
            [text(12, 6)],
        ]
    )


@pytest.mark.thin(2)
# PyramidDrop scores by the layer behind a stage, which may read positions beside the rotary tables.
@pytest.mark.parametrize(
    "reducer", [pytest.param(plans.RELEVANT, id="condiv"), "divprune", "prune", "pyramiddrop"]
)
def test_dropping_equals_masking(served: Family, reducer: Any) -> None:
    """Through `generate`, which encodes ahead of the model, with grids known."""
    model, inputs = served.build(), prompts(served)
    with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
        out = oracle.generate(model, inputs)
        masks = oracle.kept_columns(handle, inputs, served.layers)
        spans = handle.stats.spans
    assert served.name in GRIDS, f"GRIDS needs the grids of {served.name} in prompts()"
    assert [[s.grid for s in row] for row in spans] == [*GRIDS[served.name], []]
    assert all(s.grid_known for row in spans for s in row)
    length = inputs["input_ids"].shape[1]
    new = out.sequences[:, length:]
    expected = oracle.masked_logits(model, served, inputs, masks, new[:, :-1])
    for step, logits in enumerate(out.logits):
        assert (logits - expected[:, length - 1 + step]).abs().max() < 1e-5, f"step {step}"


def test_ratio_zero_changes_nothing(served: Family) -> None:
    model, inputs = served.build(), prompts(served)
    plain = oracle.generate(model, inputs)
    with tokencomp.patch(model, 0.0):
        out = oracle.generate(model, inputs)
    assert torch.equal(out.sequences, plain.sequences)
    for a, b in zip(out.logits, plain.logits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.long
@pytest.mark.parametrize("reducer", [pytest.param(plans.RELEVANT, id="condiv"), "bipartite"])
def test_batch_beams_and_drafts(served: Family, reducer: Any) -> None:
    """Beams of a batch are those of its rows; drafts of assisted decoding change nothing."""
    model = served.build()
    rows = [
        [text(3), served.image(0), text(2, 2), served.image(1), text(7, 3)],
        [served.video(4), text(3, 4), served.image(2), text(4, 5)],
    ]
    inputs = served.batch(rows)
    with tokencomp.patch(model, 0.5, reducer=reducer):
        beams = oracle.generate(model, inputs, num_beams=3).sequences
        for b, row in enumerate(rows):
            single = oracle.generate(model, served.batch([row]), num_beams=3).sequences
            assert torch.equal(beams[b, -8:], single[0, -8:])
        alone = served.batch(rows[:1])
        greedy = oracle.generate(model, alone).sequences
        drafted = oracle.generate(model, alone, prompt_lookup_num_tokens=3).sequences
    assert torch.equal(drafted, greedy)


@pytest.mark.long
def test_a_second_turn(served: Family) -> None:
    """On the cache of the first, against the whole conversation masked."""
    model, inputs = served.build(), served.batch([[text(3), served.image(0), text(6, 2)]])
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        out = oracle.generate(model, inputs)
        masks = oracle.kept_columns(handle, inputs, served.layers)
        whole = torch.cat([out.sequences, torch.tensor([text(5, 9)])], 1)
        turn = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        second = oracle.generate(model, turn, past_key_values=oracle.cache_of(out))
    length, new = inputs["input_ids"].shape[1], second.sequences
    expected = oracle.masked_logits(model, served, inputs, masks, new[:, length:-1])
    for step, logits in enumerate(second.logits):
        assert (logits - expected[:, whole.shape[1] - 1 + step]).abs().max() < 1e-5


@pytest.mark.parametrize("name", [n for n in ("glm4v", "kimi_k25") if n in STRUCTURAL])
def test_videos_with_times_between_frames(name: str) -> None:
    """One span with text in it at placeholders of images (GLM), or one per two frames (Kimi)."""
    family: Any = STRUCTURAL[name]
    model = family.build()
    rows = [[text(3), family.whole_video(4), text(5)], [text(9), family.whole_video(4), text(7)]]
    inputs = family.batch(rows)
    if name == "glm4v":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int() * 2
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        out = oracle.generate(model, inputs, suppress_tokens=[IMAGE, VIDEO])
        masks = oracle.kept_columns(handle, inputs, family.layers)
        spans = [[(s.modality, s.grid, s.text) for s in row] for row in handle.stats.spans]
        assert handle.stats.tokens_after == [[8] * 4] * 2
    joined = [("video", (2, 2, 4), (8, 9, 10))]
    assert spans == [joined if name == "glm4v" else [("video", (1, 2, 4), ())] * 2] * 2
    length = inputs["input_ids"].shape[1]
    expected = oracle.masked_logits(model, family, inputs, masks, out.sequences[:, length:-1])
    assert (torch.stack(out.logits, 1) - expected[:, length - 1 :]).abs().max() < 1e-5
