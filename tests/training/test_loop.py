"""What trained methods share: data, the loop with its loss, relevance."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import Family, text
from support.trained import write_data
from torch import Tensor, nn

import tokencomp
from tokencomp.adapters.registry import adapter_for
from tokencomp.engine.prompt import IGNORED
from tokencomp.errors import OptionError, ScoreError, UnknownNameError
from tokencomp.training.data import (
    answer_ids,
    append,
    batches,
    load_batch,
    questions,
)
from tokencomp.training.loop import Loop, LoopConfig, answer_loss
from tokencomp.training.relevance import explain

SMALL = LoopConfig(steps=3, batch=2, samples=8, kind="image", evaluate=0, save_every=1)


class Scale(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


def loop(
    tiny: Any,
    data: str,
    output: Path,
    module: nn.Module,
    loss: Any = None,
    config: LoopConfig = SMALL,
) -> Loop:
    source = questions(data, "image", 8)
    card = {"fingerprint": None, "data": data}
    return Loop(*tiny, module, source, config, output, card, loss)


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

    made = loop(tiny, data, tmp_path, module, loss)
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

        made = loop(tiny, data, tmp_path / name, module, loss)
        made.run()
        return made

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", die=2)
    again = run("killed")
    assert seen["killed"] == seen["whole"] and len(set(seen["whole"])) == 3
    assert again.history == whole.history and again.seconds >= 3 * 0.05


def test_answers_stand_behind_the_prompts_of_a_ragged_batch() -> None:
    inputs = {
        "input_ids": torch.tensor([[9, 1, 2, 3], [9, 9, 4, 5]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]),
        "pixel_values": torch.zeros(3, 4),
    }
    out, labels = append(inputs, [[7], [6, 8]])
    assert out["input_ids"].tolist() == [[9, 1, 2, 3, 7, 7], [9, 9, 4, 5, 6, 8]]
    assert out["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert out["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert out["pixel_values"] is inputs["pixel_values"]
    assert labels.tolist() == [[IGNORED] * 4 + [7, IGNORED], [IGNORED] * 4 + [6, 8]]


def test_teacher_forcing_extends_the_prompt_the_processor_makes(tiny: Any, data: str) -> None:
    model, processor = tiny
    source = questions(data, "image", 4)
    prompt, answers = load_batch([source[0], source[1]], processor, 8)
    ids = answer_ids(processor, model, answers, end=True)
    forced, labels = append(prompt, ids)
    assert processor.tokenizer.decode(labels[0][labels[0] != IGNORED]) == "red<|im_end|>"
    assert torch.equal(forced["input_ids"][:, : -len(ids[0])], prompt["input_ids"])
    assert answer_ids(processor, model, ["red"], end=False)[0] == ids[0][:-1]
    with pytest.raises(OptionError, match="empty"):
        answer_ids(processor, model, [""], end=True)


def pictures(data: object, purpose: str) -> set[Path]:
    """The files that questions of one part show."""
    return {Path(m).resolve() for e in questions(str(data), "image", 999, purpose) for m in e.media}


def ask(file: Path, media: list[Any]) -> Path:
    """A JSON Lines file with one question for every entry of `media`."""
    rows = [{"question": "What?", "answer": "red", "media": m} for m in media]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_files_are_split_by_media(tmp_path: Path) -> None:
    folder = write_data(tmp_path, 60)
    rows = (folder / "questions.jsonl").read_text()
    (folder / "questions.jsonl").write_text(rows + rows)
    train, held = (pictures(folder, purpose) for purpose in ("train", "validation"))
    assert len(held) == 3 and len(train) == 57 and not train & held
    assert len(questions(str(folder), "image", 7)) == 7


def test_pictures_that_questions_share_stay_on_one_side(tmp_path: Path) -> None:
    """Pairs, chains and other spellings of a path; together they are all pictures."""
    folder = write_data(tmp_path, 60)
    names = [f"{i}.png" for i in range(60)]
    alone = [*names[:30], *(f"./{n}" for n in names[:30])]
    chains = [[names[i], names[i + 1]] for i in range(30, 59) if i % 3 != 2]
    ask(folder / "questions.jsonl", [*alone, *chains])
    train, held = (pictures(folder, purpose) for purpose in ("train", "validation"))
    assert 1 <= len(held) <= 3 and not train & held
    assert train | held == {(folder / name).resolve() for name in names}


def test_embedded_splits_are_disjoint_and_kinds_stay_apart() -> None:
    both = questions("shapesqa", "both", 10)
    assert [e.id.split("-")[1] for e in (both[0], both[9])] == ["attribute", "needle"]
    assert both[0].id != questions("shapesqa", "both", 10, "validation")[0].id
    named = questions("shapesqa:attribute,needle,count", "both", 9)
    assert [e.family for e in named] == ["attribute", "count"] * 3 + ["needle"] * 3
    with pytest.raises(UnknownNameError, match="needle"):
        questions("shapesqa:neddle", "image", 9)
    for chosen in itertools.islice(batches(both, 3, seed=0), 20):
        assert all(i < 5 for i in chosen) or all(i >= 5 for i in chosen)


def with_answers(family: Family, rows: list[list[Any]], answers: list[list[int]]) -> tuple:
    inputs = family.batch([[*row, answer] for row, answer in zip(rows, answers, strict=True)])
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for b, answer in enumerate(answers):
        labels[b, -len(answer) :] = torch.tensor(answer)
    return inputs, labels


def brute_force(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, target: str) -> Tensor:
    """Full matrices of all layers and one backward pass per answer token; one sample."""
    rows = []
    for at in (labels[0] != IGNORED).nonzero()[:, 0].tolist():
        out = model(**inputs, output_attentions=True, use_cache=False)
        weights = out.attentions
        logits = out.logits[0, at - 1]
        y = logits[labels[0, at]] - (logits.exp().sum().log() if target == "logprob" else 0.0)
        full = torch.eye(labels.shape[1])
        for a, g in zip(weights, torch.autograd.grad(y, weights), strict=True):
            full = full + (a * g)[0].clamp(min=0).mean(0) @ full
        rows.append(full[at - 1])
    return torch.stack(rows).mean(0)


@pytest.mark.thin(3)
@pytest.mark.parametrize(("answers", "target"), [(1, "logit"), (3, "logit"), (3, "logprob")])
def test_equals_the_product_of_full_matrices(family: Family, answers: int, target: Any) -> None:
    """Several spans, several answer tokens, and a left-padded batch against single samples."""
    model = family.build("eager")
    prompts = [[text(5), family.image(), text(4), family.image(1), text(6)],
               [family.video(), text(9)]]  # fmt: skip
    replies = [text(answers, seed=3), text(max(answers - 1, 1), seed=4)]
    inputs, labels = with_answers(family, prompts, replies)
    seen, got = explain(model, inputs, labels, target)
    for b, prompt in enumerate(prompts):
        alone, answered = with_answers(family, [prompt], [replies[b]])
        expected = brute_force(model, alone, answered, target)
        pad = inputs["input_ids"].shape[1] - alone["input_ids"].shape[1]
        for span, scores in zip(seen.spans[b], got[b], strict=True):
            assert (scores >= 0).all() and scores.max() > 0
            near = expected[span.start - pad : span.stop - pad]
            torch.testing.assert_close(scores, near, atol=1e-5, rtol=1e-4)


def test_attention_backend_and_parameters_are_left_alone(family: Family) -> None:
    model = family.build("sdpa")
    inputs, labels = with_answers(family, [[family.image(), text(5)]], [text(2)])
    before = model(**inputs).logits
    sdpa = explain(model, inputs, labels)[1][0][0]
    assert adapter_for(model).text_config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, model(**inputs).logits)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(sdpa, explain(model, inputs, labels)[1][0][0])
