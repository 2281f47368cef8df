"""A model whose code lies in its own folder, with the shape of those that transformers has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import EOS, IMAGE, PAD, VOCAB, text
from transformers import AutoConfig, AutoModelForImageTextToText

import tokencomp
from tokencomp.errors import UnverifiedModelError

CONFIG = """
from transformers import PretrainedConfig, Qwen2Config


class ShardVlmConfig(PretrainedConfig):
    model_type = "shard_vlm"
    sub_configs = {"text_config": Qwen2Config}

    def __init__(self, text_config=None, patch_size=4, image_token_id=150, **kwargs):
        self.text_config = Qwen2Config(**(text_config or {}))
        self.patch_size, self.image_token_id = patch_size, image_token_id
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, Qwen2Model
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_shard import ShardVlmConfig


class ShardVlmModel(PreTrainedModel):
    config_class = ShardVlmConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        width, side = config.text_config.hidden_size, config.patch_size
        self.tower = nn.Conv2d(3, width, side, stride=side)
        self.language_model = Qwen2Model(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def get_image_features(self, pixel_values):
        return self.tower(pixel_values).flatten(2).transpose(1, 2)

    def forward(self, input_ids=None, pixel_values=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values).flatten(0, 1).to(inputs_embeds)
            place = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(place, features)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class ShardVlm(PreTrainedModel, GenerationMixin):
    config_class = ShardVlmConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        text = config.text_config
        self.model = ShardVlmModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.model.language_model

    def forward(
        self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None,
        inputs_embeds=None, use_cache=None, logits_to_keep=0, **kwargs,
    ):
        out = self.model(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask,
            position_ids=position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        name = "cache" if "cache" in out else "past_key_values"  # in older releases
        return CausalLMOutputWithPast(logits=logits, **{name: out.get(name)})

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        first = inputs["input_ids"].shape[1] > 1
        return {**inputs, "pixel_values": pixel_values if first else None}
"""


class Shard:
    """What the oracle asks of a family."""

    mrope = False

    def decoder(self, model: Any) -> Any:
        return model.model.language_model

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


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
    sizes = dict(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    values = {"model_type": "shard_vlm", "auto_map": auto, "text_config": sizes}
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
    image = [IMAGE] * 24
    rows = [[*text(3), *image, *text(2, 2), *image, *text(5, 3)], [*text(4), *image, *text(6, 4)]]
    rows.append(text(9, 6))
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
        "pixel_values": torch.randn(3, 3, 16, 24),
    }
    plain = oracle.generate(model, inputs, suppress_tokens=[IMAGE])
    for reducer in (plans.RELEVANT, "prune"):
        with tokencomp.patch(model, 0.5, reducer=reducer, verify=True) as handle:
            out = oracle.generate(model, inputs, suppress_tokens=[IMAGE])
            masks = oracle.kept_columns(handle, inputs, 4)
            assert [len(row) for row in handle.stats.spans] == [2, 1, 0]
        logits = torch.stack(out.logits, 1)
        assert (logits - torch.stack(plain.logits, 1)).abs()[:2].max() > 1e-3
        expected = oracle.masked_logits(model, Shard(), inputs, masks, out.sequences[:, width:-1])
        assert (logits - expected[:, width - 1 :]).abs().max() < 1e-5
