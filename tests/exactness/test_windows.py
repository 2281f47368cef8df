"""Attention windows are measured in columns of the uncompressed prompt.

The oracle is the windowed full-length run. Random batches have rows without media, with one and
with several, and ratios by modality, so that a batch can be as wide as before although some of its
rows have lost or merged tokens.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from support import oracle, plans
from support.families import Family, text
from support.family.hybrid import HYBRID, with_window
from support.family.llava import LlavaOn
from support.family.mistral import Mistral3
from support.family.qwen import Qwen2VL, text_config
from support.family.structural import STRUCTURAL
from support.prompts import one_of_text

import tokencomp
from tokencomp import Plan, Stage, make_reducer
from tokencomp.errors import RowIndexedAttentionError, UnsupportedModelError

STEPS = 6
# They read lengths of keys, raters of the question, the frame before, and nothing in a later layer.
NEWER = ("dart", "sparsevlm", "timechat", "mmtok+random")


MISTRAL, LLAMA = transformers.MistralConfig, transformers.LlamaConfig


class WindowedQwen(Qwen2VL):
    """Qwen2-VL with a window in every layer but the second."""

    name = "qwen2_vl_windows"

    def config(self) -> Any:
        config = super().config()
        layers = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
        config.text_config = type(config.text_config)(
            **text_config(), use_sliding_window=True, sliding_window=8, layer_types=layers
        )
        return config


class WindowedMistral3(Mistral3):
    """Mistral 3 with a window in every layer."""

    name = "mistral3_windows"

    def config(self) -> Any:
        config = super().config()
        config.text_config.sliding_window = 8
        return config


WINDOWED: dict[str, Family] = {
    "llava_mistral": LlavaOn(MISTRAL, sliding_window=8),
    "qwen2_vl_windows": WindowedQwen(),
}
if "mistral3" in STRUCTURAL:
    WINDOWED["mistral3_windows"] = WindowedMistral3()
WINDOWED |= {name: HYBRID[name] for name in ("gemma3", "gemma4") if name in HYBRID}
# Its later layers share keys, so that it takes no stages there.
EVERY = WINDOWED | {name: HYBRID[name] for name in ("gemma4_e",) if name in HYBRID}


def random_rows(family: Family, dice: random.Random) -> list[list[Any]]:
    """One to three rows with zero to two media and text of any length between them."""
    rows = []
    for _ in range(dice.randint(1, 3)):
        row: list[Any] = [text(dice.randint(1, 5), dice.randint(0, 99))]
        for _ in range(dice.choice([0, 1, 1, 2])):
            video = hasattr(family, "whole_video") and dice.random() < 0.4
            row.append(family.whole_video(4) if video else family.image(dice.randint(0, 1)))
            row.append(text(dice.randint(1, 6), dice.randint(0, 99)))
        if len(row) == 1:
            row[0] = text(dice.randint(2, 60), dice.randint(0, 99))
        rows.append(row)
    rows[0] = [text(3), family.image(dice.randint(0, 1)), *rows[0]]
    return rows


def random_setting(family: Family, dice: random.Random) -> dict[str, Any]:
    """A ratio for all media or by modality, at entry or between layers, with and without scores."""
    name = dice.choice(["uniform", "condiv", "fastv", "staged", "merging", "merging", *NEWER])
    if name == "merging":
        reducer, merge = dice.choice(["uniform", "kcenter"]), dice.choice([True, "auto"])
        return {"ratio": dice.choice([0.5, 0.75]), "reducer": reducer, "merge": merge}
    if name in NEWER:
        options = {"at": dice.choice([0.5, 0.75])} if name.endswith("random") else {}
        return {"ratio": dice.choice([0.25, 0.5, 0.75]), "reducer": name, **options}
    if name == "staged":
        uniform = make_reducer("uniform")
        return {"plan": Plan((Stage(0, 0.7, uniform), Stage(2, 0.3, uniform)))}
    ratio: Any = dice.choice([0.25, 0.5, 0.75])
    if name == "uniform" and hasattr(family, "whole_video"):
        ratio = dice.choice([{"video": 0.75}, {"image": 0.6}, {"image": 0.25, "video": 0.75}])
    return {"ratio": min(ratio, 0.5) if name == "fastv" else ratio, "reducer": name}


def check(
    model: torch.nn.Module,
    family: Family,
    inputs: dict[str, Any],
    steps: int = STEPS,
    **setting: Any,
) -> float:
    """Compare a generation with the windowed full-length run; how much the setting changes it."""
    handle, out, masks = oracle.generated(model, family, inputs, steps, **setting)
    merged = oracle.Merged(handle) if setting.get("merge", False) else None
    away = oracle.deviation(model, family, inputs, out, masks, merged)
    assert away < 1e-4
    with torch.no_grad():
        return oracle.difference(out.logits[0], model(**inputs).logits[:, -1])


def check_random(family: Family, seed: int) -> float:
    """Run one random case."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    rows, setting = random_rows(family, dice), random_setting(family, dice)
    inputs = family.batch(rows)
    model = with_window(family, dice.randint(3, inputs["input_ids"].shape[1] + STEPS + 2))
    model.set_attn_implementation(dice.choice(["sdpa", "eager"]))
    return check(model, family, inputs, **setting)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.long)])
def test_random_batches(name: str, part: int) -> None:
    effects = [check_random(WINDOWED[name], 100 * part + i) for i in range(40 if part else 8)]
    assert max(effects) > 1e-2


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("reducer", ["fastv", "uniform"])
def test_every_window(name: str, reducer: str) -> None:
    """A prompt below the window whose answer crosses it passes through equality."""
    family = WINDOWED[name]
    inputs = family.batch([[text(3), family.image(1), text(4, 2)]])
    width = inputs["input_ids"].shape[1]
    for window in range(width - 2, width + STEPS + 2):
        model = with_window(family, window)
        check(model, family, inputs, ratio=0.5, reducer=reducer)


@pytest.mark.filterwarnings("ignore::tokencomp.errors.RatioWarning")
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("longest", ["text", "image"])
def test_a_longer_row_hides_no_gaps(name: str, merge: Any, longest: str) -> None:
    """The longest row, which loses nothing or merges less, keeps the batch as wide as it was.

    The steps pass the window, and more of them the last merged row.
    """
    family = EVERY[name]
    other = [text(36, 5)]
    if longest == "image":
        other = [text(20, 5), family.image(1), text(9, 7)]
    inputs = family.batch([[text(3), family.image(0), text(4, 2)], other])
    model = with_window(family, inputs["input_ids"].shape[1] + 4)
    check(model, family, inputs, 28, ratio=0.9, reducer="kcenter", merge=merge)


@pytest.mark.parametrize(("backend", "between"), [("sdpa", False), ("eager", True)])
def test_weights_of_merged_rows_in_later_turns(backend: str, between: bool) -> None:
    """The last rows of a cache have their own weights in a second turn of several words."""
    family = LlavaOn(MISTRAL, sliding_window=12)
    model, inputs, kcenter = family.build(backend), one_of_text(family), make_reducer("kcenter")
    stages = [Stage(0, 0.5, kcenter, merge=True)]
    stages += [Stage(2, 0.2, kcenter, merge=True)] * between
    new, width = torch.tensor([text(5, 8), text(5, 9)]), inputs["input_ids"].shape[1]
    positions = family.positions(model, inputs)
    with tokencomp.patch(model, plan=Plan(tuple(stages))) as handle, torch.no_grad():
        out = model(**inputs, position_ids=positions, use_cache=True)
        later = model(**oracle.later_turn(inputs, positions, new, out)).logits
        masks = oracle.kept_columns(handle, inputs, family.layers)
    merged = oracle.Merged(handle)
    expected = oracle.masked_logits(model, family, inputs, masks, new, merged)[:, width:]
    plain = oracle.masked_logits(model, family, inputs, masks, new)[:, width:]
    assert merged.sizes.max() > 2 and oracle.difference(later, expected) < 2e-5
    assert oracle.difference(later, plain) > 1e-3


def test_a_second_image_that_merges_beyond_a_window() -> None:
    """Attention gets the last rows of the cache, and those of the turn have their own weights."""
    family = LlavaOn(MISTRAL, sliding_window=12)
    setting = {"ratio": 0.5, "reducer": "kcenter", "merge": True}
    assert oracle.image_in_second_turn(family, family.build(), **setting) < 1e-5


def test_chunks_below_a_window_have_the_weights_of_their_rows() -> None:
    family = LlavaOn(MISTRAL, sliding_window=200)
    model, inputs = family.build(), one_of_text(family)
    if not hasattr(model, "_expand_multimodal_outputs"):
        pytest.skip("this transformers cannot chunk prompts with media, patched or not")
    setting = {"ratio": 0.5, "reducer": "kcenter", "merge": True}
    call = {"prefill_chunk_size": 7}
    handle, out, masks = oracle.generated(model, family, inputs, STEPS, call, **setting)
    assert handle.stats.prefill_chunk == 7
    merged = oracle.Merged(handle)
    away = oracle.deviation(model, family, inputs, out, masks, merged)
    assert away < 1e-5


def test_a_reset_cache_holds_the_window_of_the_model() -> None:
    """After a prompt whose tokens were merged."""
    family = LlavaOn(MISTRAL, sliding_window=12)
    model, inputs, words = family.build(), one_of_text(family), family.batch([[text(30, 4)]] * 2)
    with torch.no_grad():
        with tokencomp.patch(model, 0.5, reducer="kcenter", merge=True):
            cache = oracle.cache_of(model(**inputs, use_cache=True))
            cache.reset()
            found = model(**words, past_key_values=cache, use_cache=True).logits
        plain = model(**words, use_cache=True)
    torch.testing.assert_close(found, plain.logits, atol=1e-5, rtol=1e-5)
    expected = [layer.keys.shape for layer in oracle.cache_of(plain).layers]
    assert [layer.keys.shape for layer in cache.layers] == expected


@pytest.mark.parametrize(
    ("text_model", "reducer"),
    [(LLAMA, plans.RELEVANT), (MISTRAL, "fastv")],
)
def test_below_a_window_it_changes_nothing(text_model: type, reducer: Any) -> None:
    """Prompt and generated tokens together; the model without the window is the oracle."""
    family = LlavaOn(text_model, sliding_window=60)
    model, inputs = family.build(), one_of_text(family)
    _, out, masks = oracle.generated(model, family, inputs, 5, ratio=0.5, reducer=reducer)
    model.config.text_config.sliding_window = None
    assert oracle.deviation(model, family, inputs, out, masks) < 1e-5


def test_a_window_that_only_the_cache_applies_is_refused() -> None:
    """The default cache of Llama cuts its rows to it: in a prompt, and in a longer answer."""
    family = LlavaOn(LLAMA, sliding_window=28)
    model, inputs = family.build(), family.batch([[text(3), family.image(), text(5, 2)]])
    assert inputs["input_ids"].shape[1] < 28
    handle = tokencomp.patch(model, 0.5)
    oracle.generate(model, inputs, 2)
    with pytest.raises(UnsupportedModelError, match="has 28 tokens"):
        oracle.generate(model, inputs, 8)
    inputs = family.batch([[text(9), family.image(), text(9, 2)]])
    for cached in (True, False):
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="sliding_window=28"):
            model(**inputs, use_cache=cached)
        with torch.no_grad(), handle.disabled():
            model(**inputs, use_cache=cached)


def test_a_decoder_derived_elsewhere_has_the_window_of_its_base() -> None:
    """As FSDP2 derives one; the module of its class does not import the factory of masks."""
    family = LlavaOn(MISTRAL, sliding_window=12)
    model, inputs = family.build(), one_of_text(family)
    decoder = family.decoder(model)
    decoder.__class__ = type("Derived", (type(decoder),), {"__module__": __name__})
    check(model, family, inputs, 2, ratio=0.5, reducer="uniform")


def test_compact_positions_count_kept_tokens() -> None:
    """The window is measured in the positions that the rotary embedding uses."""
    family = LlavaOn(MISTRAL, sliding_window=20)
    model, inputs = family.build(), family.batch([[text(3), family.image(), text(5, 2)]])
    assert inputs["input_ids"].shape[1] > 20
    with torch.no_grad(), tokencomp.patch(model, 0.8, positions="compact") as handle:
        found = model(**inputs, use_cache=True).logits
        model.config.text_config.sliding_window = None
        expected = model(**inputs, use_cache=False).logits
        assert handle.stats.ratio > 0.7
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava_mistral", "inkling_mm_model"])
def test_queries_that_are_scaled_by_row_are_refused(name: str) -> None:
    """As in long prompts of Llama 4 and Inkling; up to the limit the scale is one."""
    if name not in {**EVERY, **HYBRID}:
        pytest.skip("the release has no such model")
    family = {**HYBRID, "llava_mistral": LlavaOn(MISTRAL, sliding_window=200)}[name]
    model, inputs = family.build(), family.batch([[text(3), family.image(), text(5, 2)]])
    config, length = model.config.text_config, inputs["input_ids"].shape[1]
    limit = "log_scaling_n_floor" if hasattr(config, "log_scaling_n_floor") else "floor_scale"
    config.attn_temperature_tuning = True
    setattr(config, limit, length + 1)
    with torch.no_grad(), tokencomp.patch(model, 0.5):
        model(**inputs)
    setattr(config, limit, length)
    with tokencomp.patch(model, 0.5), pytest.raises(RowIndexedAttentionError, match="number"):
        model(**inputs)


def test_chunks_begin_at_the_first_token_of_every_sample() -> None:
    """Of Llama 4, after padding that is no multiple of a chunk."""
    family = LlavaOn(
        transformers.Llama4TextConfig, attention_chunk_size=8, attn_temperature_tuning=False,
        head_dim=16, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    inputs = family.batch([[text(3), family.image(), text(5, 2)], [text(2), family.image()]])
    check(family.build(), family, inputs, 10, ratio=0.5, reducer="uniform")
