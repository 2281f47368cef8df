"""A model whose code lies in its own folder, with the shape of those that transformers has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import FAMILIES, IMAGE, text
from transformers import AutoConfig, AutoModelForImageTextToText

import tokencomp
from tokencomp.errors import UnverifiedModelError

FAMILY = FAMILIES["llava"]
CONFIG = """
from transformers import LlavaConfig


class ShardVlmConfig(LlavaConfig):
    model_type = "shard_vlm"
"""
MODELING = """
from transformers import LlavaForConditionalGeneration, LlavaModel

from .configuration_shard import ShardVlmConfig


class ShardVlmModel(LlavaModel):
    config_class = ShardVlmConfig


class ShardVlm(LlavaForConditionalGeneration):
    config_class = ShardVlmConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = ShardVlmModel(config)
        self.post_init()
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loaded from a folder that holds the code, as `trust_remote_code` does it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "shard"
    folder.mkdir()
    (folder / "configuration_shard.py").write_text(CONFIG)
    (folder / "modeling_shard.py").write_text(MODELING)
    auto = {
        "AutoConfig": "configuration_shard.ShardVlmConfig",
        "AutoModelForImageTextToText": "modeling_shard.ShardVlm",
    }
    values = {**FAMILY.config().to_dict(), "model_type": "shard_vlm", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, trust_remote_code=True).eval()


@pytest.mark.long
def test_code_of_a_folder_runs_with_verify(model: Any) -> None:
    """A ragged batch with two images, one, and none: prefill and decoding."""
    assert type(model).__module__.startswith("transformers_modules.")
    with pytest.raises(UnverifiedModelError, match="verify=True"):
        tokencomp.patch(model, 0.5)
    rows = [[text(3), FAMILY.image(), text(2, 2), FAMILY.image(), text(5, 3)]]
    rows += [[text(4), FAMILY.image(), text(6, 4)], [text(9, 6)]]
    inputs = FAMILY.batch(rows)
    width = inputs["input_ids"].shape[1]
    plain = oracle.generate(model, inputs, suppress_tokens=[IMAGE])
    for reducer in (plans.RELEVANT, "prune"):
        with tokencomp.patch(model, 0.5, reducer=reducer, verify=True) as handle:
            out = oracle.generate(model, inputs, suppress_tokens=[IMAGE])
            masks = oracle.kept_columns(handle, inputs, 4)
            assert [len(row) for row in handle.stats.spans] == [2, 1, 0]
        logits = torch.stack(out.logits, 1)
        assert (logits - torch.stack(plain.logits, 1)).abs()[:2].max() > 1e-3
        expected = oracle.masked_logits(model, FAMILY, inputs, masks, out.sequences[:, width:-1])
        assert (logits - expected[:, width - 1 :]).abs().max() < 1e-5
