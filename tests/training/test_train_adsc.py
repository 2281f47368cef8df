"""Training of the ADSC adapter."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.trained import tiny as make_tiny
from support.trained import write_data

import tokencomp
from benchmarks.accuracy.studies.adsc import load_adapter
from tokencomp.errors import (
    MediaError,
    OptionError,
    WeightsError,
)
from tokencomp.inputs.loading import load_model
from tokencomp.training import adsc
from tokencomp.training.adsc import CARD, FILES, AdscConfig, add_lora, train_adsc
from tokencomp.training.data import load_batch, questions

pytest.importorskip("peft")
SMALL = AdscConfig(
    schedule=("0.67", "0|0.5"),
    steps=4,
    batch=2,
    samples=8,
    kind="image",
    evaluate=2,
    save_every=1,
    ratios=(0.0, 0.67),
)


def copied(tiny: Any) -> tuple[Any, Any]:
    """PEFT changes the model it wraps."""
    return copy.deepcopy(tiny[0]), tiny[1]


@pytest.fixture(scope="module")
def trained(tiny: Any, data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("adsc")
    return train_adsc(*copied(tiny), data, output, SMALL), output


def test_an_adapter_of_another_model_is_refused(trained: Any, tiny: Any, tmp_path: Path) -> None:
    tuned, output = trained
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    again = load_adapter(copied(tiny)[0], output)
    assert torch.equal(again(**inputs).logits, tuned(**inputs).logits)
    with pytest.raises(WeightsError, match=r"no adapter_model\.safetensors.*tokencomp train adsc"):
        load_adapter(copied(tiny)[0], tmp_path)
    other = copied(tiny)[0]
    weight = other.model.language_model.layers[0].self_attn.k_proj.weight
    weight.data = torch.randn_like(weight)
    with pytest.raises(WeightsError, match="another checkpoint"):
        load_adapter(other, output)
    for name in (*FILES, CARD):
        content = (output / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_adapter(copied(tiny)[0], tmp_path)


def test_a_finished_run_is_resumed_and_another_is_refused(
    trained: Any, tiny: Any, data: str
) -> None:
    _, output = trained
    before = (output / "adapter_model.safetensors").read_bytes()
    train_adsc(*copied(tiny), data, output, SMALL)
    assert (output / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(OptionError, match="rank"):
        train_adsc(*copied(tiny), data, output, replace(SMALL, rank=4))


def test_schedules_run_in_both_directions() -> None:
    mild = AdscConfig(schedule=("0.5", "0.67", "0.8"), steps=9)
    harsh = AdscConfig(schedule=("0.8", "0.67", "0.5"), steps=9)
    ratios = [mild.ratio_at(step) for step in range(9)]
    assert ratios == [0.5] * 3 + [0.67] * 3 + [0.8] * 3
    assert [harsh.ratio_at(step) for step in range(9)] == ratios[::-1]
    turns = AdscConfig(schedule=("0", "0.5|0.8"), steps=8)
    assert [turns.ratio_at(step) for step in range(8)] == [0.0] * 4 + [0.5, 0.8] * 2


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_adapter(
    tiny: Any, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two checkpoints, with dropout and ratios that take turns."""
    config = replace(SMALL, steps=6, save_every=2, dropout=0.2, evaluate=0)
    real, calls = adsc.answer_loss, []

    def dies(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    train_adsc(*copied(tiny), data, tmp_path / "whole", config)
    monkeypatch.setattr(adsc, "answer_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train_adsc(*copied(tiny), data, tmp_path / "killed", config)
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["checkpoint.pt"]
    monkeypatch.setattr(adsc, "answer_loss", real)
    train_adsc(*copied(tiny), data, tmp_path / "killed", config)
    files = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "killed"))
    whole, killed = map(load_file, files)
    assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole)


def test_a_run_on_other_lines_is_refused(tiny: Any, tmp_path: Path) -> None:
    folder, config = write_data(tmp_path / "data", 40), replace(SMALL, steps=1, evaluate=0)
    train_adsc(*copied(tiny), str(folder), tmp_path / "out", config)
    lines = folder / "questions.jsonl"
    lines.write_text(lines.read_text().replace("red", "blue"))
    with pytest.raises(OptionError, match="differs in content"):
        train_adsc(*copied(tiny), str(folder), tmp_path / "out", config)


def test_a_run_that_fails_leaves_the_model_as_it_was(tiny: Any, tmp_path: Path) -> None:
    """In its third step, adapter trained; the next run starts from the same model."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, processor = copied(tiny)
    model.peft_config = {"somebody's": LoraConfig()}
    next(model.parameters()).requires_grad_(False)
    folder = write_data(tmp_path / "data", 8)
    inputs, _ = load_batch([questions(str(folder), "image", 1)[0]], processor, 8)
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    fields, modes = set(vars(model)), [m.training for m in model.modules()]
    expected = model(**inputs).logits
    (folder / "6.png").write_bytes(b"no picture")
    config = replace(SMALL, steps=40, learning_rate=0.1, save_every=99)
    with pytest.raises(MediaError):
        train_adsc(model, processor, str(folder), tmp_path / "out", config)
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before
    assert (set(vars(model)), [m.training for m in model.modules()]) == (fields, modes)
    assert list(model.peft_config) == ["somebody's"]
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    "name",
    ["qwen2_vl", *(pytest.param(n, marks=pytest.mark.long) for n in ("llava_onevision", "vila"))],
)
def test_every_embedded_family_trains(name: str, data: str, tmp_path: Path) -> None:
    """Only the adapter changes; loaded by PEFT, it compresses and answers as it was trained."""
    from peft import PeftModel

    folder = tmp_path / "model"
    plain, processor = make_tiny(folder, name=f"tiny-{name.replace('_', '-')}")
    tuned = train_adsc(
        *load_model(str(folder), device="cpu"), data, tmp_path / "out", replace(SMALL, evaluate=0)
    )
    states = load_file(tmp_path / "out" / "adapter_model.safetensors")
    changed = [value for key, value in states.items() if ".lora_B." in key]
    assert changed and all(value.abs().max() > 0 for value in changed)
    again = PeftModel.from_pretrained(load_model(str(folder), device="cpu")[0], tmp_path / "out")
    inputs, _ = load_batch([questions(data, "image", 1)[0]], processor, 8)
    logits = []
    for model in (tuned, again.eval()):
        with tokencomp.patch(model, 0.67, reducer="adsc") as handle, torch.no_grad():
            logits.append(model(**inputs).logits[:, -1])
            assert handle.stats.ratio == pytest.approx(0.67, abs=0.06)
    assert torch.equal(*logits)
    with tuned.disable_adapter(), torch.no_grad():
        assert torch.equal(tuned(**inputs).logits, plain(**inputs).logits)


def test_lora_starts_as_the_model_itself(tiny: Any) -> None:
    model, _ = copied(tiny)
    tuned = add_lora(model, SMALL)
    trainable = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n and "visual" not in n for n in trainable)
