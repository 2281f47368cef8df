"""The ccam reducer in a model, and its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests_support import Family, text

import tokencomp
from tokencomp.errors import SpanError, WeightsError
from tokencomp.evaluation.examples import Example
from tokencomp.projectors.ccam import CCAMConfig, CCAMProjector
from tokencomp.training.capture import capture
from tokencomp.training.ccam import CcamConfig, Live, train_ccam, visual_tokens
from tokencomp.weights import model_card

SMALL = CcamConfig(
    queries=3, steps=4, align=2, batch=2, samples=8, kind="image", evaluate=2, save_every=2
)


def saved(model: Any, folder: Path, queries: int) -> Path:
    width = int(model.get_decoder().config.hidden_size)
    torch.manual_seed(1)
    config = CCAMConfig(queries, 16, 2, 16, width, width)
    return CCAMProjector(config).save(folder, model_card(model))


def test_any_number_of_frames_gives_as_many_tokens(family: Family, tmp_path: Path) -> None:
    """Spans keep their special tokens; what stands there is the projector's output."""
    model = family.build()
    path = saved(model, tmp_path, queries=3)
    module = CCAMProjector.load(path)
    for frames in (4, 8):
        inputs = family.batch([[text(3), family.video(frames), text(4)]])
        plain = capture(model, inputs, layers=False)
        with tokencomp.patch(model, reducer="ccam", weights=str(path)) as handle:
            seen = _decoder_input(model, inputs)
            kept = handle.stats.kept(0)[0]
        spans, gone = plain.spans[0], 0
        for span, rows in zip(spans, kept, strict=True):
            patch = ~span.special_mask()
            assert len(rows) == 3 + int((~patch).sum())
            features = plain.inputs[0][0, span.start : span.stop][patch]
            expected = module(features[None], span.grid[0])[0]
            at = span.start - gone + patch[rows].nonzero()[:, 0]
            torch.testing.assert_close(seen[0, at], expected)
            gone += span.length - len(rows)


def _decoder_input(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    found = []
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(
        lambda m, a, k: found.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return found[0]


def test_media_below_the_number_of_queries_are_refused(family: Family, tmp_path: Path) -> None:
    model = family.build()
    path = saved(model, tmp_path, queries=999)
    inputs = family.batch([[family.image(), text(4)]])
    with (
        tokencomp.patch(model, reducer="ccam", weights=str(path)),
        pytest.raises(SpanError, match="smaller than"),
    ):
        model(**inputs)


def test_weights_must_exist_and_fit(family: Family, tmp_path: Path) -> None:
    model = family.build()
    with pytest.raises(WeightsError, match="tokencomp train ccam"):
        tokencomp.patch(model, reducer="ccam")
    path = saved(model, tmp_path, queries=3)
    with pytest.raises(WeightsError, match="another checkpoint"):
        tokencomp.patch(family.build(seed=5), reducer="ccam", weights=str(path))


def test_the_budget_is_the_mean_of_a_sample_of_media(tiny: Any) -> None:
    """Questions with several images of different sizes; 28 pixels of a side are one token."""
    sides = [[84], [168, 84], [56]] * 40
    source = [
        Example(str(i), "What?", "red", tuple(Image.new("RGB", (s, s)) for s in row))
        for i, row in enumerate(sides)
    ]
    for count in (1, 3, 48):
        places = [i * count // 16 for i in range(16)] if count > 16 else range(count)
        asked = [s for i in places for s in sides[i]]
        expected = sum((s // 28) ** 2 for s in asked) / len(asked)
        assert visual_tokens(*tiny, source[:count], SMALL) == pytest.approx(expected)


@pytest.fixture(scope="module")
def trained(tiny: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_ccam(*tiny, data, tmp_path_factory.mktemp("ccam"), SMALL)


def test_training_changes_the_projector_alone(trained: Path, tiny: Any) -> None:
    card = json.loads(trained.with_suffix(".json").read_text())
    assert len(card["loss"]) == 4
    assert [r["name"] for r in card["accuracy"]] == ["full", "ccam", "pool", "random"]
    assert {r["tokens"] for r in card["accuracy"][1:]} == {3.0}
    assert all(p.requires_grad and p.grad is None for p in tiny[0].parameters())
    torch.manual_seed(SMALL.seed)
    fresh = CCAMProjector(SMALL.sizes(tiny[0])).state_dict()
    after = CCAMProjector.load(trained).state_dict()
    assert all(not torch.equal(fresh[k], after[k]) for k in ("query", "k_proj.weight"))


def test_a_killed_run_ends_with_the_same_weights(
    trained: Path, tiny: Any, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tokencomp.training.ccam as module

    real, calls = module.answer_loss, []

    def dies(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "answer_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train_ccam(*tiny, data, tmp_path, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    monkeypatch.setattr(module, "answer_loss", real)
    again = CCAMProjector.load(train_ccam(*tiny, data, tmp_path, SMALL)).state_dict()
    for key, value in CCAMProjector.load(trained).state_dict().items():
        torch.testing.assert_close(again[key], value)


def test_gradients_pass_the_patched_model(tiny: Any, data: str) -> None:
    """The loss through the frozen model pulls on every part of the projector."""
    from tokencomp.training.data import answer_ids, append, load_batch, questions
    from tokencomp.training.loop import answer_loss

    model, processor = tiny
    source = questions(data, "image", 2)
    inputs, answers = load_batch([source[0], source[1]], processor, 8)
    forced, labels = append(inputs, answer_ids(processor, model, answers, end=True))
    module = CCAMProjector(SMALL.sizes(model))
    with tokencomp.patch(model, 0.5, reducer=Live(module=module)):
        answer_loss(model, forced, labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    model.zero_grad()
