"""Bad input: typed errors that say what was given, what is allowed, and the fix."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.families import FAMILIES, Family, text
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tokencomp
from benchmarks.conformance.variants import variants
from tokencomp import Plan, Stage, errors, make_reducer
from tokencomp.conformance.build import tiny_model
from tokencomp.conformance.prompts import Prompts

FAMILY_NAMES = ["internvl", "qwen2_vl"]


def prompt(family: Family) -> dict[str, torch.Tensor]:
    return family.batch([[text(3), family.image(0), text(6, 3)]])


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan, "half", "0.75", False, 10**400])
def test_ratio(ratio: Any) -> None:
    """Text is no number, as in budgets and options."""
    model = FAMILIES["qwen2_vl"].build()
    for given in ({"ratio": ratio}, {"ratio": {"video": ratio}}, {"ratio": 0.5}):
        tower = {"tower_ratio": ratio} if given == {"ratio": 0.5} else {}
        if tower != {"tower_ratio": False}:  # off
            with pytest.raises(errors.RatioError, match=r"\[0, 1\)"):
                tokencomp.patch(model, **given, **tower)


def test_a_bad_request_keeps_the_earlier_patch(family: Family) -> None:
    model, inputs = family.build(), prompt(family)
    handle = tokencomp.patch(model, 0.5, reducer="uniform")
    expected = model(**inputs).logits
    with pytest.raises(errors.RatioError):
        handle.set(ratio=2)
    with pytest.raises(errors.UnknownNameError):
        tokencomp.patch(model, 0.5, reducer="nothing")
    with pytest.raises(errors.OptionError, match="target_tokens=-1"):
        tokencomp.patch(model, 0.9, reducer="uniform", extend_context=-1)
    attention = family.decoder(model).layers[-1].self_attn
    config, attention.config = attention.config, None
    with pytest.raises(errors.UnsupportedModelError, match="merge=True"):
        tokencomp.patch(model, 0.9, reducer="kcenter", merge=True)
    attention.config = config
    assert torch.equal(model(**inputs).logits, expected)


def test_a_change_that_the_model_refuses_is_forgotten() -> None:
    """What the handle shows, and what a later change starts from, is the earlier setting."""
    handle = tokencomp.patch(FAMILIES["qwen2_vl"].build(), 0.5, reducer="uniform")
    before = repr(handle)
    with pytest.raises(errors.PlanError):
        handle.set(plan=Plan((Stage(99, 0.5, make_reducer("uniform")),)))
    assert repr(handle) == before
    assert handle.set(ratio=0.75).plan.stages[0].fraction == 0.25


def test_a_plan_stands_alone() -> None:
    """Beside a plan nothing is accepted that would be ignored, and nothing is planned anew."""
    model = FAMILIES["qwen2_vl"].build()
    plan = Plan((Stage(0, 0.4, make_reducer("uniform")),))
    with pytest.raises(errors.OptionError, match=r"reducer='nonsense'.*typo"):
        tokencomp.patch(model, plan=plan, reducer="nonsense", typo=3)
    with pytest.raises(errors.OptionError, match=r"ratio=0\.5"):
        tokencomp.patch(model, 0.5, plan=plan)
    handle = tokencomp.patch(model, plan=plan)
    with pytest.raises(errors.OptionError, match=r"set\(reducer=...\)"):
        handle.set(ratio=0.9)
    with pytest.raises(errors.OptionError, match="nonsense"):
        handle.set(plan=plan, nonsense=1)
    with pytest.raises(errors.OptionError, match=r"ratio=0\.9"):
        handle.set(plan=plan, ratio=0.9)
    assert handle.plan == plan
    handle.set(ratio=0.9, reducer="uniform").set(plan=plan).set(reducer="random", seed=3)
    assert handle.plan.entry.reducer == make_reducer("random", seed=3)
    assert handle.plan.ratio(4) == pytest.approx(0.9)


def test_unsupported_models() -> None:
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )
    )  # fmt: skip
    with pytest.raises(errors.UnsupportedModelError, match=r"Llama.*placeholder"):
        tokencomp.patch(llama)
    with pytest.raises(errors.UnsupportedModelError, match="no adapter"):
        tokencomp.patch(torch.nn.Linear(2, 2))


def test_stage_outside_the_decoder(family: Family) -> None:
    plan = Plan((Stage(family.layers, 0.5, make_reducer("uniform")),))
    with pytest.raises(errors.PlanError, match=f"{family.layers} layers"):
        tokencomp.patch(family.build(), plan=plan)
    with pytest.raises(errors.PlanError, match="non-increasing"):
        Plan((Stage(0, 0.5, make_reducer("uniform")), Stage(2, 0.7, make_reducer("uniform"))))
    with pytest.raises(errors.PlanError, match="ascending"):
        Plan((Stage(2, 0.5, make_reducer("uniform")), Stage(0, 0.2, make_reducer("uniform"))))


def test_a_cache_layer_of_another_layout(family: Family) -> None:
    from transformers.cache_utils import DynamicLayer

    class PackedLayer(DynamicLayer):
        """Some other layout."""

    model, cache = family.build(), transformers.DynamicCache()
    cache.layers = [PackedLayer() for _ in range(family.layers)]
    with (
        tokencomp.patch(model, 0.5),
        pytest.raises(errors.UnsupportedCacheError, match=r"holds PackedLayer"),
    ):
        model(**prompt(family), past_key_values=cache, use_cache=True)


def test_a_model_that_prunes_videos_itself() -> None:
    """Images are compressed all the same, and videos once the model no longer prunes them."""
    tiny = tiny_model(
        transformers.NemotronH_Omni_Reasoning_V3,
        CONFIG_MAPPING["nemotron_h_omni"](video_pruning_rate=0.7),
        variants("nemotron_h_omni")[0],
    )
    model, prompts = tiny.whole, Prompts(tiny)
    features = torch.randn(1, 24, tiny.text_config.hidden_size)
    outputs = SimpleNamespace(
        pooler_output=[features[0]], last_hidden_state=torch.zeros(1, 4, 6, 1)
    )
    ids = torch.tensor([[130, *[prompts.image_id] * 24, 131]])
    video = {"input_ids": ids, "mm_encoder_outputs": {"video": outputs}}
    with tokencomp.patch(model, 0.5, reducer="uniform") as handle, torch.no_grad():
        prompts.forward(prompts.inputs([0]))
        assert handle.stats.ratio > 0.4
        with pytest.raises(
            errors.AlreadyCompressedError, match=r"Set model\.video_pruning_rate = 0"
        ):
            model(**video)
        model.video_pruning_rate = 0
        model(**video)
        assert handle.stats.tokens_before == [24]


def test_strict_refuses_text_only(family: Family) -> None:
    model, inputs = family.build(), family.batch([[text(5)]])
    with tokencomp.patch(model, 0.5, strict=True):
        with pytest.raises(errors.NoVisualInputError, match="strict"):
            model(**inputs)
        model.generate(**prompt(family), max_new_tokens=3)  # decode steps carry no media


def test_nan_features(family: Family) -> None:
    model, inputs = family.build(), prompt(family)
    with torch.no_grad():
        family.decoder(model).layers[0].self_attn.q_proj.weight.fill_(torch.nan)
    with (
        tokencomp.patch(model, 0.5, reducer="prune", score="last_query"),
        pytest.raises(errors.ScoreError, match="NaN"),
    ):
        model(**inputs)
