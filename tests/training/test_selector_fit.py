"""Training of the selector's network on made-up labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokencomp.errors import OptionError, ScoreError
from tokencomp.reducers.selector import SelectorNet
from tokencomp.training.selector import fit as selector_fit
from tokencomp.training.selector.fit import fit, targets
from tokencomp.training.selector.train import SelectorConfig, agreement

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


@pytest.mark.long
def test_training_finds_a_pattern_that_the_raw_row_does_not_show() -> None:
    """Relevance sits right of the attention peak: the raw row misses it, the network learns it."""
    generator = torch.Generator().manual_seed(0)

    def pair(n: int) -> tuple[Tensor, Tensor]:
        row, label = torch.rand(n, generator=generator) * 0.1, torch.zeros(n)
        peak = int(torch.randint(0, n - 2, (1,), generator=generator))
        row[peak] += 1.0
        label[peak + 2] = 1.0
        return row / row.sum(), label

    train, held = [pair(20 + i % 25) for i in range(300)], [pair(128) for _ in range(40)]
    config = SelectorConfig(epochs=6, batch_spans=20, learning_rate=5e-3)
    net, _ = fit(train, held, config, channels=(16, 16, 16))
    found = agreement(net, held)["0.1"]
    assert found["selector"] > 0.95 and found["attention"] < 0.5 and found["oracle"] == 1.0


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


@pytest.mark.parametrize("where", [0, 1])
def test_labels_that_are_not_finite_are_an_error(where: int) -> None:
    wrong = pairs(6, 8)
    wrong[1][where][3] = torch.nan
    for train, held in ((wrong, pairs(7)), (pairs(7), wrong)):
        with pytest.raises(ScoreError, match="NaN"):
            fit(train, held, SelectorConfig(epochs=1), channels=(4,))


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
    config, real = SelectorConfig(epochs=5, batch_spans=4), selector_fit._train_epoch

    def run(name: str) -> tuple[dict[str, Tensor], float]:
        net, seconds = fit(train, held, config, tmp_path / f"{name}.pt", (4, 4))
        return net.state_dict(), seconds

    def dies(net: Any, optimizer: Any, spans: Any, config: Any, epoch: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt
        real(net, optimizer, spans, config, epoch)

    whole, _ = run("whole")
    monkeypatch.setattr(selector_fit, "_train_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.setattr(selector_fit, "_train_epoch", real)
    state = torch.load(tmp_path / "killed.pt")
    torch.save({**state, "seconds": state["seconds"] + 1000}, tmp_path / "killed.pt")
    again, seconds = run("killed")
    assert all(torch.equal(v, again[k]) for k, v in whole.items())
    assert state["epoch"] == 3 and seconds > 1000
