"""Weights of trained methods: found, checked against the model, bound to the patch; shipped."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.matrix import small_weights
from support.matrix import tokens as matrix_tokens
from support.trained import tiny as make_tiny

import tokencomp
from tokencomp import make_reducer, plan_from_json, plan_to_json, zoo
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import OptionError, WeightsError
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.packaged import DEFAULT_MODEL
from tokencomp.reducers.registry import options_of
from tokencomp.serving.servable import serving_safe
from tokencomp.trained.cards import (
    check_card,
    model_card,
    model_facts,
    write,
)
from tokencomp.training.data import load_batch, questions


def copied(trained: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for suffix in (".safetensors", ".json"):
        shutil.copy(trained.with_suffix(suffix), folder / f"selector{suffix}")
    return folder / "selector.safetensors"


def patched(model: Any, folder: Path) -> None:
    tokencomp.patch(model, 0.5, reducer="selector", weights=str(folder)).remove()


def test_weights_beside_the_model_are_found(trained: Path, tmp_path: Path) -> None:
    model, _ = make_tiny(tmp_path)
    with pytest.raises(WeightsError, match="tokencomp train selector"):
        tokencomp.patch(model, 0.5, reducer="selector")
    copied(trained, tmp_path)
    tokencomp.patch(model, 0.5, reducer="selector").remove()


def test_weights_of_other_models_are_refused(trained: Path, tiny: Any, tmp_path: Path) -> None:
    other, _ = make_tiny(tmp_path, seed=1)
    with pytest.raises(WeightsError, match="another checkpoint"):
        tokencomp.patch(other, 0.5, reducer="selector", weights=str(trained))
    card = model_card(tiny[0])
    facts = model_facts(adapter_for(tiny[0]))
    check_card(card, facts, trained, "")
    check_card(model_card(copy.deepcopy(tiny[0]).to(torch.bfloat16)), facts, trained, "")
    for wrong in ({"num_layers": 9}, {"hidden_size": 9}, {"model_type": "llava"}):
        with pytest.raises(WeightsError, match=next(iter(wrong))):
            check_card({**card, **wrong}, facts, trained, "")


def test_the_card_says_what_the_network_reads(tiny: Any, tmp_path: Path) -> None:
    """It decides where `input` is left out; another one is refused, bound or not."""
    model, facts = tiny[0], model_facts(adapter_for(tiny[0]))
    for reads, other in (("attention", "features"), ("features", "attention")):
        card = model_card(model)
        weights = small_weights("selector", card["hidden_size"], card, reads)
        for given in ({}, {"input": reads}):
            bound = make_reducer("selector", weights=weights, **given).bind(facts)
            assert options_of(bound) == {"weights": weights, "pick": "top", "input": reads}
            assert serving_safe(bound) == (reads == "features")
        wrong = make_reducer("selector", weights=weights, input=other)
        tokens = matrix_tokens((1, 3, 3), dim=card["hidden_size"])
        message = f"to read {reads}, not {other}"
        with pytest.raises(WeightsError, match=message):
            wrong.bind(facts)
        with pytest.raises(WeightsError, match=message):
            wrong.reduce(tokens)
        with pytest.raises(WeightsError, match=message):
            tokencomp.patch(model, 0.5, reducer="selector", weights=weights, input=other)


def test_a_selector_without_weights_is_refused() -> None:
    reducer = make_reducer("selector", input="features")
    with pytest.raises(OptionError, match="tokencomp train selector"):
        reducer.reduce(matrix_tokens((1, 3, 3)))


def test_bad_cards_are_refused(trained: Path, tiny: Any, tmp_path: Path) -> None:
    good = json.loads(trained.with_suffix(".json").read_text())
    cases = (
        ({"channels": "abc"}, "does not hold a selector"),
        ({"kind": "ccam"}, "'ccam', not a 'selector'"),
        (b"[]", "cannot be read"),
    )
    for number, (change, message) in enumerate(cases):
        folder = tmp_path / str(number)
        card = copied(trained, folder).with_suffix(".json")
        made = change if isinstance(change, bytes) else json.dumps({**good, **change}).encode()
        card.write_bytes(made)
        with pytest.raises(WeightsError, match=message):
            patched(tiny[0], folder)


def test_a_patch_keeps_the_network_it_has_checked(
    trained: Path, tiny: Any, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another working directory, and another file in its place, change nothing."""
    model, processor = tiny
    file = copied(trained, tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    inputs, _ = load_batch([questions(data, "image", 1)[0]], processor, 8)
    with tokencomp.patch(model, 0.5, reducer="selector", weights="weights") as handle:
        model(**inputs)
        kept = handle.stats.kept(0)
        monkeypatch.chdir("/")
        tensors = {k: torch.rand_like(v.float()).to(v.dtype) for k, v in load_file(file).items()}
        write(file, tensors, {"channels": [4]})
        model(**inputs)
        assert handle.stats.kept(0) == kept
        stored = plan_to_json(handle.plan)
        assert stored[0]["options"]["weights"] == str(file)
        assert plan_to_json(plan_from_json(stored)) == stored


MODELS = zoo.SAMPLES.parent / "models"
KINDS = ("selector", "ccam")
SIBLINGS = {"tiny-qwen3-5", "tiny-gemma3", "tiny-qwen3-vl-long"}
SHIPPED = sorted(
    (path.parents[1].name, path.stem)
    for kind in KINDS
    for path in MODELS.glob(f"*/tokencomp/{kind}.safetensors")
)
every_file = pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if name == DEFAULT_MODEL else [pytest.mark.long])
        for name, kind in SHIPPED
    ],
)


def test_every_packaged_model_but_the_siblings_has_them() -> None:
    names = set(zoo.available_models()) - SIBLINGS
    assert set(SHIPPED) == {(n, kind) for n in names for kind in KINDS}


@every_file
def test_found_without_a_path_and_runs(name: str, kind: str) -> None:
    """On images and videos, with fewer tokens and finite logits."""
    model, processor = load_model(name, device="cpu")
    for media in ("image", "video"):
        source = questions("shapesqa", media, 2, "test")
        inputs, _ = load_batch([source[0], source[1]], processor, 8)
        with tokencomp.patch(model, 0.5, reducer=kind) as handle, torch.no_grad():
            logits = model(**inputs).logits[:, -1]
        assert torch.isfinite(logits).all()
        left = [seen[-1] for seen in handle.stats.tokens_after]
        assert all(0 < a < b for a, b in zip(left, handle.stats.tokens_before, strict=True))


def test_other_checkpoints_refuse_them(tmp_path: Path) -> None:
    other, _ = make_tiny(tmp_path)
    for name, kind in SHIPPED:
        with pytest.raises(WeightsError, match="trained for"):
            tokencomp.patch(other, 0.5, reducer=kind, weights=str(MODELS / name))
