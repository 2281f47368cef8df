"""An embedded architecture as the recipes write it: real processor, random weights.

Its fixtures, and its answers to one question at a time, an oracle of batches and stored runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tokencomp
from tokencomp.inputs.prompts import build_inputs

HOW = {"max_new_tokens": 4, "progress": False}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL folder as the recipes write it."""
    from recipes.tiny.export import export
    from recipes.tiny.families.qwen2_vl import FAMILY
    from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer

    path = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    write_tokenizer(path, FAMILY.chat_template)
    return export(FAMILY.build(load_tokenizer(path)), FAMILY, path)


@pytest.fixture(scope="session")
def loaded(folder: Path) -> tuple[Any, Any]:
    from tokencomp.inputs.loading import load_model

    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Three image and two video questions on real files."""
    from tokencomp.zoo.shapesqa.examples import shapesqa
    from tokencomp.zoo.shapesqa.items import items

    media = tmp_path_factory.mktemp("media")
    images = items("validation", 1, ("attribute", "existence", "count"))
    return shapesqa([*images, *items("validation", 1, ("needle", "direction"))], media)


def one_by_one(loaded, example, reducer=None, ratio=0.0):
    """The answer to a single prompt, straight through `generate`."""
    model, processor = loaded
    inputs = build_inputs(processor, [example.load(8)], [example.prompt])
    handle = tokencomp.patch(model, ratio, reducer=reducer) if reducer else None
    out = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    if handle is not None:
        handle.remove()
    answer = out[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True).strip()
