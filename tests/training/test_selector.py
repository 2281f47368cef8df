"""The selector: network, training, weights, reducer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import Family, text
from trained_support import tiny as make_tiny

import tokencomp
from tokencomp import VisualTokens, make_reducer
from tokencomp.context import Attention
from tokencomp.errors import OptionError, ScoreError, WeightsError
from tokencomp.evaluation.examples import Example
from tokencomp.reducers.oracle import truth
from tokencomp.reducers.selector import SelectorNet, load_selector
from tokencomp.training.capture import capture
from tokencomp.training.data import load_batch, questions
from tokencomp.training.selector import (
    AttentionRow,
    SelectorConfig,
    agreement,
    fit,
    target_of,
    train_selector,
)
from tokencomp.training.selector_labels import explain_batch
from tokencomp.weights import check_card, model_card, write

SMALL = SelectorConfig(
    samples=6, kind="image", batch=3, epochs=1, held_out=3, evaluate=2, max_new_tokens=2
)


def test_attention_row_equals_the_eager_map_of_layer_zero(family: Family) -> None:
    """Mean over heads and user rows of the full softmax, answers left out, padded batch."""
    model = family.build("eager")
    rows = [[text(3), family.image(), text(6), [5, 6]], [family.video(), text(4), [8]]]
    inputs = family.batch(rows)
    got = capture(model, inputs, layers=False).attention_rows([2, 1])
    for b, (row, tail) in enumerate(zip(rows, (2, 1), strict=True)):
        alone = family.batch([row])
        weights = model(**alone, output_attentions=True).attentions[0][0].mean(0)
        visual = (alone["input_ids"][0] >= 150) & (alone["input_ids"][0] <= 151)
        last = int(visual.nonzero().max())
        for scores, (start, stop, voters) in zip(
            got[b], _spans(model, alone, last, len(visual) - tail), strict=True
        ):
            expected = weights[voters][:, start:stop].mean(0)
            torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


def _spans(model: Any, inputs: Any, last: int, stop: int) -> list[tuple[int, int, list[int]]]:
    found = []
    spans = capture(model, inputs, layers=False).spans[0]
    visual = {c for s in spans for c in range(s.start, s.stop)}
    for span in spans:
        voters = [i for i in range(span.stop, stop) if i not in visual]
        found.append((span.start, span.stop, voters))
    return found


def test_network_takes_any_length_and_ignores_the_scale_of_a_row() -> None:
    net = SelectorNet().eval()
    assert [m.out_channels for m in net.layers if m.__class__.__name__ == "Conv1d"][1::2] == [
        32, 64, 128, 256, 512,
    ]  # fmt: skip
    for n in (1, 5, 64, 4000):
        row = torch.rand(2, n)
        assert net(row).shape == (2, n)
        torch.testing.assert_close(net(row), net(row / 1000), atol=1e-3, rtol=1e-3)


def test_targets_zero_the_lowest_half_and_sum_to_one() -> None:
    labels = torch.tensor([[4.0, 1.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor([[4 / 7, 0, 3 / 7, 0], [0, 0, 0.5, 0.5]])
    torch.testing.assert_close(target_of(labels, 0.5), expected)


def test_training_finds_a_pattern_that_the_raw_row_does_not_show() -> None:
    """Relevance sits right of the attention peak: the raw row misses it, the network learns it."""
    generator = torch.Generator().manual_seed(0)

    def pair(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        row, label = torch.rand(n, generator=generator) * 0.1, torch.zeros(n)
        peak = int(torch.randint(0, n - 2, (1,), generator=generator))
        row[peak] += 1.0
        label[peak + 2] = 1.0
        return row / row.sum(), label

    train, held = [pair(32) for _ in range(300)], [pair(128) for _ in range(40)]
    config = SelectorConfig(epochs=6, batch_spans=20, learning_rate=5e-3)
    net = fit(train, held, config, channels=(16, 16, 16))
    found = agreement(net, held)["0.1"]
    assert found["selector"] > 0.95 and found["attention"] < 0.5 and found["oracle"] == 1.0


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    pairs, file = [(torch.rand(8), torch.rand(8)) for _ in range(6)], tmp_path / "checkpoint.pt"
    config, channels = SelectorConfig(epochs=2), (4, 4)
    labels = {"data": "a", "content": "1"}
    net = fit(pairs, pairs, config, file, channels, labels)
    again = fit(pairs, pairs, config, file, channels, labels)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    for name in ("epochs", "learning_rate", "zeroed", "batch_spans", "seed"):
        other = replace(config, **{name: getattr(config, name) / 2 or 1})
        with pytest.raises(OptionError, match=name):
            fit(pairs, pairs, other, file, channels, labels)
    with pytest.raises(OptionError, match="channels"):
        fit(pairs, pairs, config, file, (4, 4, 4), labels)
    with pytest.raises(OptionError, match="content"):
        fit(pairs, pairs, config, file, channels, {**labels, "content": "2"})
    state = torch.load(file)
    del state["identity"]  # as older versions wrote them
    torch.save(state, file)
    with pytest.raises(OptionError, match="another --output"):
        fit(pairs, pairs, config, file, channels, labels)


def test_explained_batches_do_not_depend_on_their_company(tiny: Any, data: str) -> None:
    model, processor = tiny
    source = questions(data, "image", 3)
    together = explain_batch(model, processor, [source[i] for i in range(3)], SMALL)
    for i in range(3):
        (alone,) = explain_batch(model, processor, [source[i]], SMALL)
        for a, b in zip(alone, together[i], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def trained(tiny: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("selector")
    return train_selector(*tiny, data, output, SMALL)


def test_training_saves_weights_and_a_card(trained: Path, tiny: Any) -> None:
    card = json.loads(trained.with_suffix(".json").read_text())
    assert card["model_type"] == "qwen2_vl" and card["layer"] == 0
    assert set(card["held_out"]["0.5"]) == {"oracle", "selector", "attention", "random"}
    assert {r["name"] for r in card["accuracy"]} == {"full", "selector", "attention", "random"}
    net, _ = load_selector(trained)
    assert not net.training
    assert not list(trained.parent.glob(".*"))


def test_a_second_run_reads_labels_and_checkpoint(
    trained: Path, tiny: Any, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tokencomp.training.selector_labels as module

    def refuse(*args: Any) -> None:
        raise AssertionError("explained again")

    monkeypatch.setattr(module, "explain_batch", refuse)
    before = trained.read_bytes()
    assert train_selector(*tiny, data, trained.parent, SMALL).read_bytes() == before
    other = SelectorConfig(**{**vars(SMALL), "answers": "given"})
    with pytest.raises(OptionError, match="answers"):
        train_selector(*tiny, data, trained.parent, other)


def test_labels_of_other_data_are_refused(
    trained: Path, tiny: Any, data: str, tmp_path: Path
) -> None:
    output, copy = tmp_path / "out", tmp_path / "data"
    shutil.copytree(trained.parent, output)
    shutil.copytree(data, copy)
    with pytest.raises(OptionError, match="differs in data"):
        train_selector(*tiny, str(copy), output, SMALL)
    lines, before = Path(data) / "questions.jsonl", (Path(data) / "questions.jsonl").read_text()
    try:
        lines.write_text(before.replace("circle", "square"))
        with pytest.raises(OptionError, match="differs in content"):
            train_selector(*tiny, data, output, SMALL)
    finally:
        lines.write_text(before)


def test_the_reducer_follows_the_network(trained: Path, tiny: Any, data: str) -> None:
    """Kept tokens are the top of the network's logits on the row that training saw."""
    model, processor = tiny
    inputs, _ = load_batch([questions(data, "image", 1)[0]], processor, 8)
    row = capture(model, inputs, layers=False).attention_rows([0])[0][0]
    with torch.no_grad():
        wanted = load_selector(trained)[0](row[None])[0].topk(4).indices.sort().values
    weights = str(trained.parent)
    with tokencomp.patch(model, 5 / 9, reducer="selector", weights=weights) as handle:
        model(**inputs)
        assert handle.stats.kept(0)[0][0] == wanted.tolist()
        assert handle.stats.ratio == pytest.approx(5 / 9)


def test_weights_beside_the_model_are_found(trained: Path, tmp_path: Path) -> None:
    model, _ = make_tiny(tmp_path)
    with pytest.raises(WeightsError, match="tokencomp train selector"):
        tokencomp.patch(model, 0.5, reducer="selector")
    for suffix in (".safetensors", ".json"):
        shutil.copy(trained.with_suffix(suffix), tmp_path / f"selector{suffix}")
    tokencomp.patch(model, 0.5, reducer="selector").remove()


def test_weights_of_other_models_are_refused(trained: Path, tiny: Any, tmp_path: Path) -> None:
    other, _ = make_tiny(tmp_path, seed=1)
    with pytest.raises(WeightsError, match="another checkpoint"):
        tokencomp.patch(other, 0.5, reducer="selector", weights=str(trained))
    card = model_card(tiny[0])
    check_card(card, tiny[0], trained, "")
    check_card(model_card(tiny[0].to(torch.bfloat16)), tiny[0], trained, "")
    tiny[0].to(torch.float32)
    for wrong in ({"num_layers": 9}, {"hidden_size": 9}, {"model_type": "llava"}):
        with pytest.raises(WeightsError, match=next(iter(wrong))):
            check_card({**card, **wrong}, tiny[0], trained, "")


def test_missing_and_broken_files_are_refused(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny
    with pytest.raises(WeightsError, match="does not exist"):
        tokencomp.patch(model, 0.5, reducer="selector", weights=str(tmp_path / "none"))
    file = tmp_path / "selector.safetensors"
    file.write_bytes(b"junk")
    with pytest.raises(WeightsError, match="cannot be read"):
        tokencomp.patch(model, 0.5, reducer="selector", weights=str(tmp_path))
    write(file, {"a": torch.zeros(1)}, {**model_card(model), "channels": [4]})
    with pytest.raises(WeightsError, match="does not hold a selector"):
        tokencomp.patch(model, 0.5, reducer="selector", weights=str(tmp_path))


def test_special_tokens_stay_and_signals_are_asked_for(trained: Path) -> None:
    reducer = make_reducer("selector", weights=str(trained))
    assert reducer.needs == {Attention("text")}
    special = torch.zeros(12, dtype=torch.bool)
    special[[5, 11]] = True
    given = VisualTokens(torch.zeros(12, 4), (1, 2, 5), special, scores=torch.rand(12))
    kept = reducer.reduce(given, 4).keep.tolist()
    assert len(kept) == 4 and {5, 11} <= set(kept)
    for bad in (None, torch.full((12,), torch.inf)):
        given.scores = bad
        for one in (reducer, AttentionRow(), make_reducer("prune")):
            with pytest.raises(ScoreError):
                one.reduce(given, 4)


def test_every_device_has_its_own_copy(trained: Path) -> None:
    net, _ = load_selector(trained)
    moved, _ = load_selector(trained, "meta")
    assert {p.device.type for p in moved.parameters()} == {"meta"}
    assert {p.device.type for p in load_selector(trained)[0].parameters()} == {"cpu"}
    assert load_selector(trained)[0] is net


def test_oracle_keeps_the_relevant_tokens_or_says_what_is_missing(family: Family) -> None:
    model = family.build()
    inputs = family.batch([[text(4), family.video(), text(5)], [family.image(), text(3)]])
    spans = capture(model, inputs, layers=False).spans
    relevance = [[torch.rand(s.length) for s in row] for row in spans]
    with tokencomp.patch(model, 0.5, reducer="oracle") as handle:
        with truth(relevance):
            model(**inputs)
        for b, row in enumerate(spans):
            for j, span in enumerate(row):
                kept = handle.stats.kept(b)[0][j]
                score = relevance[b][j].masked_fill(span.special_mask(), 9.0)
                assert set(kept) == set(score.topk(len(kept)).indices.tolist())
        with pytest.raises(ScoreError, match="truth"):
            model(**inputs)


def test_examples_without_media_are_refused(tiny: Any) -> None:
    with pytest.raises(OptionError, match="no image or video"):
        explain_batch(*tiny, [Example("1", "What?", "red")], SMALL)
