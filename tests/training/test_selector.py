"""The selector: labels, network, training, reducer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.families import Family, text
from support.trained import SELECTOR, broken, write_data
from torch import Tensor

from tokencomp.errors import MediaError, OptionError, ScoreError
from tokencomp.reducers.selector import SelectorNet
from tokencomp.training.capture import capture
from tokencomp.training.data import questions
from tokencomp.training.relevance import attention_bytes
from tokencomp.training.selector import fit as selector_fit
from tokencomp.training.selector import labels as selector_labels
from tokencomp.training.selector.fit import fit, targets
from tokencomp.training.selector.labels import explain_batch
from tokencomp.training.selector.train import SelectorConfig, train_selector


def test_attention_row_equals_the_eager_map_of_layer_zero(family: Family) -> None:
    """Mean over heads and user rows of the full softmax, answers left out, padded batch."""
    model = family.build("eager")
    rows = [[text(3), family.image(), text(6), [5, 6]], [family.video(), text(4), [8, 9]]]
    inputs = family.batch(rows)
    got = capture(model, inputs, layers=False).attention_rows(answer=2)
    for b, row in enumerate(rows):
        alone = family.batch([row])
        weights = model(**alone, output_attentions=True).attentions[0][0].mean(0)
        for scores, (start, stop, voters) in zip(
            got[b], _spans(model, alone, len(weights) - 2), strict=True
        ):
            expected = weights[voters][:, start:stop].mean(0)
            torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


def _spans(model: Any, inputs: Any, stop: int) -> list[tuple[int, int, list[int]]]:
    found = []
    spans = capture(model, inputs, layers=False).spans[0]
    visual = {c for s in spans for c in range(s.start, s.stop)}
    for span in spans:
        voters = [i for i in range(span.stop, stop) if i not in visual]
        found.append((span.start, span.stop, voters))
    return found


LENGTHS = (5, 2, 9, 7)


def pairs(*lengths: int, features: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Labels of random attention rows, or of random features of this width."""
    shapes = [(n, features) if features else (n,) for n in lengths]
    return [(torch.rand(shape), torch.rand(shape[0])) for shape in shapes]


def test_targets_zero_the_lowest_half_and_sum_to_one() -> None:
    labels = ([4.0, 1.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0])
    expected = ([4 / 7, 0, 3 / 7, 0], [0, 0, 0.5, 0.5], [0, 2 / 3, 1 / 3])
    got = targets([(torch.ones(len(v)), torch.tensor(v)) for v in labels], 0.5)
    for (_, target), reference in zip(got, expected, strict=True):
        torch.testing.assert_close(target, torch.tensor(reference))


def plain(net: SelectorNet, rows: list[Tensor]) -> list[Tensor]:
    """The network span by span; only the batch norm sees all spans of a batch, end to end."""
    xs = [torch.log(row / row.mean() + 0.01)[None] if row.ndim == 1 else row for row in rows]
    if net.stem is not None:
        tokens = [[(x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() for x in x] for x in xs]
        xs = [torch.stack([net.stem.weight @ t for t in span], 1) for span in tokens]
    layers = list(net.layers)
    for depth, point, norm in zip(layers[::4], layers[1::4], layers[2::4], strict=True):
        xs = [F.conv1d(x[None], depth.weight, padding=1, groups=len(x))[0] for x in xs]
        xs = [F.conv1d(x[None], point.weight)[0] for x in xs]
        every = torch.cat(xs, 1)
        mean, var = every.mean(1, keepdim=True), every.var(1, keepdim=True, unbiased=False)
        scale = norm.weight[:, None] / (var + norm.eps).sqrt()
        xs = [F.relu((x - mean) * scale + norm.bias[:, None]) for x in xs]
    return [F.conv1d(x[None], net.head.weight, net.head.bias)[0, 0] for x in xs]


@pytest.mark.parametrize("features", [0, 7])
def test_padding_is_no_data(features: int) -> None:
    """Spans of different lengths in one batch: logits and gradients of the plain loop."""
    net = SelectorNet((6, 4, 5), features).train()
    spans = targets(pairs(*LENGTHS, features=features), 0.5)
    rows, reference, real = selector_fit._padded(spans, net)
    assert real is not None and real.sum(1).tolist() == list(LENGTHS)
    got, expected = net(rows, real), plain(net, [row for row, _ in spans])
    for b, logits in enumerate(expected):
        torch.testing.assert_close(got[b, : len(logits)], logits, atol=1e-5, rtol=1e-4)
    divergences = [
        sum(t * (t.log() - p) for t, p in zip(target, logits.log_softmax(0), strict=True) if t > 0)
        for (_, target), logits in zip(spans, expected, strict=True)
    ]
    losses = (selector_fit.divergence(got, reference), torch.stack(divergences).mean())
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(v, list(net.parameters())) for v in losses), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_what_teaches_nothing_is_left_out() -> None:
    """Single tokens and spans without relevance beside good spans: as if they were not there."""
    good, held = pairs(6, 8, 8), pairs(7)
    bad = [(torch.rand(1), torch.rand(1)), (torch.rand(8), torch.zeros(8))]
    config = SelectorConfig(epochs=2, batch_spans=1)
    expected, _ = fit(good, held, config, channels=(4,))
    got, _ = fit([*good, *bad], [*bad, *held], config, channels=(4,))
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in got.state_dict().items())
    for train, kept in ((bad, held), (good, bad), ([], held)):
        with pytest.raises(OptionError, match="can be learned from"):
            fit(train, kept, config, channels=(4,))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    spans, file = pairs(*[8] * 6), tmp_path / "checkpoint.pt"
    config, labels = SelectorConfig(epochs=2), {"data": "a", "content": "1"}
    net, _ = fit(spans, spans, config, file, (4, 4), labels)
    again, _ = fit(spans, spans, config, file, (4, 4), labels)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    for name, how in {
        "learning_rate": (replace(config, learning_rate=1e-3), file, (4, 4), labels),
        "channels": (config, file, (4, 4, 4), labels),
        "content": (config, file, (4, 4), {**labels, "content": "2"}),
    }.items():
        with pytest.raises(OptionError, match=name):
            fit(spans, spans, *how)


def test_a_killed_run_ends_with_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of both sessions count."""
    train, held = pairs(*range(4, 24)), pairs(9, 12)
    config, real = SelectorConfig(epochs=5, batch_spans=4), selector_fit.Fit.loss

    def run(name: str) -> tuple[dict[str, Tensor], float]:
        net, seconds = fit(train, held, config, tmp_path / f"{name}.pt", (4, 4))
        return net.state_dict(), seconds

    def dies(run: selector_fit.Fit, batch: Any) -> Tensor:
        if (run.phase, run.step) == (3, 2):
            raise KeyboardInterrupt
        return real(run, batch)

    whole, _ = run("whole")
    monkeypatch.setattr(selector_fit.Fit, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.setattr(selector_fit.Fit, "loss", real)
    state = torch.load(tmp_path / "killed.pt")
    torch.save({**state, "seconds": state["seconds"] + 1000}, tmp_path / "killed.pt")
    again, seconds = run("killed")
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
    assert state["phase"] == 3 and seconds > 1000


def test_explained_batches_do_not_depend_on_their_company(
    tiny: Any, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together, one by one, and as many at once as memory allows."""
    source = questions(data, "image", 5)
    examples = [source[i] for i in range(5)]
    together = explain_batch(*tiny, examples, SELECTOR)
    alone = [explain_batch(*tiny, [example], SELECTOR)[0] for example in examples]
    monkeypatch.setattr(selector_labels, "MEMORY", 2 * attention_bytes(tiny[0], 40) - 1)
    some = explain_batch(*tiny, examples, SELECTOR)
    for other in (alone, some):
        for a, b in zip(together, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_a_second_run_reads_labels_and_checkpoint(
    trained: Path, tiny: Any, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("explained again")

    monkeypatch.setattr(selector_labels, "explain_batch", refuse)
    before = trained.read_bytes()
    assert train_selector(*tiny, data, trained.parent, SELECTOR).read_bytes() == before
    with pytest.raises(OptionError, match="answers"):
        train_selector(*tiny, data, trained.parent, replace(SELECTOR, answers="given"))


def test_labels_of_other_data_are_refused(
    trained: Path, tiny: Any, data: str, tmp_path: Path
) -> None:
    output, copy = tmp_path / "out", tmp_path / "data"
    shutil.copytree(trained.parent, output)
    shutil.copytree(data, copy)
    with pytest.raises(OptionError, match="differs in data"):
        train_selector(*tiny, str(copy), output, SELECTOR)
    lines, before = Path(data) / "questions.jsonl", (Path(data) / "questions.jsonl").read_text()
    try:
        lines.write_text(before.replace("circle", "square"))
        with pytest.raises(OptionError, match="differs in content"):
            train_selector(*tiny, data, output, SELECTOR)
    finally:
        lines.write_text(before)


def test_what_cannot_be_explained_leaves_nothing(tiny: Any, data: str, tmp_path: Path) -> None:
    """A broken picture, and a model that computes NaN."""
    folder, output = write_data(tmp_path / "data", 40), tmp_path / "out"
    for picture in folder.glob("*.png"):
        picture.write_bytes(b"junk")
    with pytest.raises(MediaError):
        train_selector(*tiny, str(folder), output, SELECTOR)
    with pytest.raises(ScoreError, match="NaN"):
        train_selector(broken(tiny[0]), tiny[1], data, output, SELECTOR)
    assert not output.exists()
    output.write_text("")
    with pytest.raises(OptionError, match="is not a folder"):
        train_selector(*tiny, data, output, SELECTOR)
