"""`patch(verify=True)` on models of a type that never passed conformance."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralModel

import tokencomp
from tokencomp import zoo
from tokencomp.conformance.build import tiny_model
from tokencomp.errors import OptionError, UnverifiedModelError


class RemoteConfig(Mistral3Config):
    model_type = "remote_vlm"


class RemoteModel(Mistral3ForConditionalGeneration):
    config_class = RemoteConfig


class RowDecoder(MistralModel):
    """Adds the number of a row to it, so that a row is another one when earlier rows are gone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs["inputs_embeds"]
        rows = torch.arange(x.shape[1], device=x.device)[None, :, None]
        return super().forward(*args, **{**kwargs, "inputs_embeds": x + 0.01 * rows})


class FromTheEnd(MistralAttention):
    """Forgets what is far from a query in rows, which are fewer when earlier rows are gone."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        fade = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None, :, None]
        return super().forward(hidden_states * 0.9**fade, *args, **kwargs)


class OuterModel(RemoteModel):
    """Replaces attention after the decoder has been built."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.language_model.layers:
            layer.self_attn.__class__ = FromTheEnd


class RowModel(RemoteModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.language_model = RowDecoder(config.text_config)


def test_an_unknown_type_needs_verify() -> None:
    model = tiny_model(RemoteModel, RemoteConfig()).model
    with pytest.raises(UnverifiedModelError, match="verify=True"):
        tokencomp.patch(model, 0.5)
    handle = tokencomp.patch(model, 0.5, verify=True)
    assert handle.plan.stages
    with pytest.raises(OptionError, match="verify"):
        handle.set(verify=False)
    handle.remove()


def test_verify_refuses_what_is_not_exact() -> None:
    model = tiny_model(RowModel, RemoteConfig()).model
    with pytest.raises(UnverifiedModelError, match="entry: difference"):
        tokencomp.patch(model, 0.5, verify=True)
    with pytest.raises(UnverifiedModelError):
        tokencomp.patch(model, 0.5)


@pytest.mark.parametrize("where", ["class", "instance"])
def test_verify_refuses_attention_that_its_copy_does_not_have(where: str) -> None:
    """Replaced in the outer class, or by the user in a model whose class has passed."""
    model = tiny_model(RemoteModel, RemoteConfig()).model
    tokencomp.patch(model, 0.5, verify=True).remove()
    if where == "class":
        model = OuterModel(model.config)
    else:
        model.model.language_model.layers[1].self_attn.__class__ = FromTheEnd
    with pytest.raises(UnverifiedModelError, match=r"self_attn is a FromTheEnd.*MistralAttention"):
        tokencomp.patch(model, 0.5, verify=True)


def test_adapters_and_quantized_weights_are_checked() -> None:
    """Linear layers of another class, with modules inside, change no position."""
    model = tiny_model(RemoteModel, RemoteConfig()).model
    layer = model.model.language_model.layers[0].self_attn
    layer.q_proj = torch.nn.Sequential(layer.q_proj, torch.nn.Identity())
    tokencomp.patch(model, 0.5, verify=True).remove()


def test_a_class_typed_into_a_notebook_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typed", ModuleType("typed"))
    typed = type("TypedModel", (RemoteModel,), {"__module__": "typed"})
    tokencomp.patch(tiny_model(typed, RemoteConfig()).model, 0.5, verify=True).remove()


@pytest.mark.parametrize("name", ["tiny-qwen3-vl", "tiny-llava-onevision", "tiny-vila"])
def test_configs_with_sizes_of_their_own_are_checked(name: str) -> None:
    """Features are added to one layer of the first; the tiles of the second have larger patches,
    and the third is the class of this package.
    """
    model = zoo.load(name)[0]
    with tokencomp.patch(model, 0.5, verify=True) as handle:
        assert handle.plan.stages
