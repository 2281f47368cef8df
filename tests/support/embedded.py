"""Fixtures: an embedded architecture as the recipes write it, real processor, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


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
    from tokencomp.evaluation import shapesqa
    from tokencomp.zoo.shapesqa.items import items

    media = tmp_path_factory.mktemp("media")
    images = items("validation", 1, ("attribute", "existence", "count"))
    return shapesqa([*images, *items("validation", 1, ("needle", "direction"))], media)
