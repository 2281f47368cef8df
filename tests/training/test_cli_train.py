"""`tokencomp train ...` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tokencomp
from tokencomp.cli import main
from tokencomp.reducers._trained import load
from tokencomp.reducers.selector import Selector
from tokencomp.training.capture import capture
from tokencomp.training.data import load_batch, questions
from tokencomp.training.relevance import TARGET


@pytest.fixture(scope="module")
def folder(tiny: Any) -> str:
    return tiny[0].config._name_or_path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(args)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.long
def test_each_command_trains_and_says_how_to_use_the_result(
    folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    common = ("--model", folder, "--data", data, "--batch", "2", "--evaluate", "2")
    common = (*common, "--samples", "4", "--device", "cpu")
    for command, extra, file in (
        ("selector", ("--epochs", "1", "--held-out", "2"), "selector.json"),
        ("adsc", ("--steps", "2", "--schedule", "0.5"), "tokencomp.json"),
        ("ccam", ("--steps", "2", "--queries", "3", "--align", "1"), "ccam.json"),
    ):
        output = tmp_path / command
        code, out, _ = run(capsys, "train", command, *common, *extra, "--output", str(output))
        assert code == 0 and "random" in out
        card = json.loads((output / file).read_text())
        assert card["model_type"] == "qwen2_vl"
        assert command != "selector" or card["config"]["target"] == TARGET


@pytest.mark.long
def test_a_selector_of_features_is_trained_for_servers(
    tiny: Any, folder: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its labels hold the standardised features that the decoder gets, and it runs without text."""
    args = ("--model", folder, "--data", data, "--batch", "2", "--samples", "4", "--held-out", "2")
    args = (*args, "--epochs", "1", "--evaluate", "2", "--device", "cpu", "--output", str(tmp_path))
    code, out, _ = run(capsys, "train", "selector", "--input", "features", *args)
    assert code == 0 and "input='features'" in out
    card = json.loads((tmp_path / "selector.json").read_text())
    assert card["input"] == "projected visual features" and card["config"]["input"] == "features"
    assert set(card["held_out"]["0.5"]) == {"oracle", "selector", "random"}
    stored = load_file(tmp_path / "labels" / "train" / "000000.safetensors")["rows"].float()
    assert stored.shape == (18, card["hidden_size"])
    model, processor = tiny
    source, entering = questions(data, "image", 4), []
    for i in range(4):
        inputs, _ = load_batch([source[i]], processor, 8)
        seen = capture(model, inputs, layers=False)
        entering.append(seen.inputs[0][0, seen.spans[0][0].start : seen.spans[0][0].stop])
    x = torch.cat(entering)
    wide = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.cdist(stored, wide).min(1).values.max() < 0.02  # of half precision
    weights = str(tmp_path)
    with tokencomp.patch(model, 5 / 9, reducer="selector", weights=weights) as handle:
        model(**inputs)
    with torch.no_grad():
        logits = load(Selector, tmp_path / "selector.safetensors")[0](entering[-1][None])[0]
    first = logits.sort(descending=True, stable=True).indices[:4]  # three patches are alike
    assert handle.stats.kept(0)[0][0] == first.sort().values.tolist()
