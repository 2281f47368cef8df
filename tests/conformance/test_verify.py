"""`patch(verify=True)` on models of a type that never passed conformance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration
from transformers.models.mistral.modeling_mistral import MistralModel

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


@pytest.mark.parametrize("name", ["tiny-qwen3-vl", "tiny-llava-onevision"])
def test_configs_with_sizes_of_their_own_are_checked(name: str) -> None:
    """Features are added to one layer of the first; the tiles of the second have larger patches."""
    model = zoo.load(name)[0]
    with tokencomp.patch(model, 0.5, verify=True) as handle:
        assert handle.plan.stages


def test_a_type_that_has_passed_and_cannot_be_checked_is_accepted_without() -> None:
    """VILA has no method that returns features, and tests of its own."""
    model = zoo.load("tiny-vila")[0]
    with pytest.raises(UnverifiedModelError, match="takes its type without verify=True"):
        tokencomp.patch(model, 0.5, verify=True)
    tokencomp.patch(model, 0.5).remove()
