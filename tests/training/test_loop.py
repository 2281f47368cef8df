"""The loop of trained methods: its loss, what it refuses, and resumption."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import Family, text
from torch import Tensor, nn

import tokencomp
from tokencomp.errors import ScoreError
from tokencomp.training.data import append, questions
from tokencomp.training.loop import Loop, LoopConfig, answer_loss

SMALL = LoopConfig(steps=3, batch=2, samples=8, kind="image", evaluate=0, save_every=1)


class Scale(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


def loop(
    tiny: Any,
    data: str,
    file: Path,
    module: nn.Module,
    loss: Any = None,
    config: LoopConfig = SMALL,
) -> Loop:
    source = questions(data, "image", 8)
    return Loop(*tiny, module, source, config, file, {"data": data}, loss, "test")


def test_losses_under_a_patch_see_full_length_labels(family: Family) -> None:
    """Short logits at the end, or labels over the whole length: the same loss and gradients."""
    model = family.build().train()
    rows = [[text(4), family.image(), text(6), [9, 8]], [family.video(), text(7), [5, 4]]]
    inputs = family.batch(rows)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    weight = family.decoder(model).layers[0].self_attn.o_proj.weight
    with tokencomp.patch(model, 0.5, reducer="adsc"):
        short = answer_loss(model, inputs, labels)
        full = model(**inputs, labels=labels, use_cache=False).loss
        torch.testing.assert_close(short, full)
        grads = [torch.autograd.grad(loss, weight)[0] for loss in (short, full)]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0


def test_answers_of_any_length_do_not_vote(family: Family) -> None:
    """In training every sample keeps what the prompt alone keeps, however long the others are."""
    model = family.build()
    inputs = family.batch([[family.image(), text(6)], [text(3), family.image(1), text(6, seed=2)]])
    forced, labels = append(inputs, [[9, 8, 7, 6], [5]])
    for reducer in ("aim", "fastv", "adsc"):
        with tokencomp.patch(model, 0.6, reducer=reducer) as handle, torch.no_grad():
            model(**inputs, use_cache=False)
            expected = [handle.stats.kept(sample) for sample in (0, 1)]
            answer_loss(model, forced, labels)
            assert [handle.stats.kept(sample) for sample in (0, 1)] == expected


def test_loss_is_the_mean_over_answer_tokens(family: Family) -> None:
    """Against every sample by itself, filled up by nothing."""
    model = family.build()
    prompts, answers = [[family.image(), text(6)], [family.video(), text(9)]], [[9, 8, 7], [5]]
    forced, labels = append(family.batch(prompts), answers)
    token_losses = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(**family.batch([[*prompt, answer]])).logits[0, -len(answer) - 1 : -1]
        token_losses += [-logits.log_softmax(-1)[i, token] for i, token in enumerate(answer)]
    torch.testing.assert_close(answer_loss(model, forced, labels), torch.stack(token_losses).mean())


def nan_loss(weight: Tensor) -> Tensor:
    return weight * torch.nan


def nan_gradient(weight: Tensor) -> Tensor:
    return torch.sqrt(weight * 0)


@pytest.mark.parametrize("wrong", [nan_loss, nan_gradient])
def test_divergence_is_an_error_and_no_step(
    tiny: Any, data: str, tmp_path: Path, wrong: Any
) -> None:
    """After a good first step; its checkpoint stays as it was."""
    module = Scale()

    def loss(inputs: dict[str, Any], labels: Tensor) -> Tensor:
        return wrong(module.weight) if made.step else module.weight**2

    made = loop(tiny, data, tmp_path / "checkpoint.pt", module, loss)
    with pytest.raises(ScoreError, match="step 2"):
        made.run()
    state = torch.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 1 and torch.equal(state["weights"]["weight"], module.weight.detach())


def test_randomness_and_seconds_survive_a_kill(tiny: Any, data: str, tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {"whole": [], "killed": []}

    def run(name: str, die: int = 9) -> Loop:
        module = Scale()

        def loss(inputs: dict[str, Any], labels: Tensor) -> Tensor:
            if made.step == die:
                raise KeyboardInterrupt
            time.sleep(0.05)
            seen[name].append(float(torch.rand(())))
            return module.weight * seen[name][-1]

        made = loop(tiny, data, tmp_path / f"{name}.pt", module, loss)
        made.run()
        return made

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", die=2)
    again = run("killed")
    assert seen["killed"] == seen["whole"] and len(set(seen["whole"])) == 3
    assert again.history == whole.history and again.seconds >= 3 * 0.05
