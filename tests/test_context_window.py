"""The extended visual window is compared with the formula of YaRN in plain loops."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.families import FAMILIES, IMAGE, VIDEO, Family, text
from transformers import DynamicCache

import tokencomp
from tokencomp.context_window import VISUAL_WINDOW, yarn
from tokencomp.errors import CopyError, SpanError, UnsupportedModelError

FAMILY_NAMES = ["internvl", "qwen2_vl"]


def ramp(stretched: torch.Tensor, base: float) -> tuple[int, int]:
    """The first pair whose frequency changes, less one, and the first that is divided in full."""
    dim = 2 * len(stretched)
    factors = [f * base ** (2 * i / dim) for i, f in enumerate(stretched.tolist())]
    changed = next(i for i, f in enumerate(factors) if f < 1 - 1e-5)
    return changed - 1, next(i for i, f in enumerate(factors) if f < factors[-1] * (1 + 1e-5))


def reference(base: float, dim: int, window: int, factor: float) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor by the formula of the paper (arXiv 2309.00071)."""

    def pair(turns: float) -> float:
        """The pair that turns so often within the window."""
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), dim - 1)
    frequencies = []
    for i in range(dim // 2):
        share = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
        plain = base ** (-2 * i / dim)
        frequencies.append(plain * (1 - share) + plain / factor * share)
    return torch.tensor(frequencies), 0.1 * math.log(factor) + 1


@pytest.mark.parametrize(
    ("base", "dim", "window"), [(1e6, 128, 6272), (1e4, 64, 500), (5e5, 96, 64)]
)
@pytest.mark.parametrize("factor", [1.0, 2.5, 8.0])
def test_frequencies(base: float, dim: int, window: int, factor: float) -> None:
    inv_freq, attention = yarn(base, dim, window, factor)
    expected = reference(base, dim, window, factor)
    assert torch.allclose(inv_freq, expected[0], rtol=1e-5)
    assert attention == pytest.approx(expected[1])


def test_model_uses_scaled_frequencies_until_unpatch(family: Family) -> None:
    """For both kinds of positions the rotary table is YaRN's, and unpatch restores it."""
    model = family.build()
    rotary = family.decoder(model).rotary_emb
    before, scaling, state = rotary.inv_freq, rotary.attention_scaling, set(model.state_dict())
    inputs = family.batch([[text(3), family.video(4), text(4, 2)]])
    with torch.no_grad():
        plain = model(**inputs).logits
        tokencomp.extend_visual_context(model, 900, window=100)  # which the next one replaces
        context = tokencomp.extend_visual_context(model, 400, window=100)
        inv_freq, attention = reference(1e4, 16, 100, 4.0)
        assert torch.allclose(rotary.inv_freq, inv_freq, rtol=1e-5)
        assert rotary.attention_scaling == pytest.approx(attention)
        assert context.factor == 4.0
        changed = model(**inputs).logits
        assert (changed - plain).abs().max() > 1e-3
        tokencomp.unpatch(model)
        assert torch.equal(model(**inputs).logits, plain)
    assert rotary.inv_freq is before and rotary.attention_scaling == scaling
    assert set(model.state_dict()) == state
    context.remove()


def test_a_patch_that_resumes_leaves_a_later_extension_in_force() -> None:
    """Of the user, which a patch inside of another one and its end do not replace."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    rotary = family.decoder(model).rotary_emb
    plain = rotary.inv_freq
    with tokencomp.patch(model, 0.5, extend_context=400):
        with tokencomp.patch(model, 0.75):
            context = tokencomp.extend_visual_context(model, 900, window=100)
        assert torch.allclose(rotary.inv_freq, reference(1e4, 16, 100, 9.0)[0], rtol=1e-5)
    assert torch.allclose(rotary.inv_freq, reference(1e4, 16, 100, 9.0)[0], rtol=1e-5)
    context.remove()
    assert rotary.inv_freq is plain


def test_ramp_of_qwen2_in_a_model() -> None:
    """The ramp is the same if a cast rounded the frequencies: fp16 keeps one digit of 1e-6."""
    family = FAMILIES["qwen2_vl"]
    config = family.config()
    config.text_config.hidden_size = config.vision_config.hidden_size = 128
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 1
    config.text_config.rope_parameters["rope_theta"] = 1e6
    model = family.model_class()(config)
    rotary = family.decoder(model).rotary_emb
    for cast in (model, model.bfloat16(), model.half()):
        plain = rotary.inv_freq.float()
        with tokencomp.extend_visual_context(cast, 4 * VISUAL_WINDOW):
            factors = rotary.inv_freq / plain
        usual = 1e6 ** (-torch.arange(0, 128, 2) / 128)
        assert ramp(factors * usual, 1e6) == (15, 32)


def test_copies_are_refused() -> None:
    """A copy would keep the scaled frequencies, and nothing could restore them."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    before = family.decoder(model).rotary_emb.inv_freq
    with tokencomp.extend_visual_context(model, 400, window=100):
        for part in (model, model.model, family.decoder(model), family.decoder(model).rotary_emb):
            with pytest.raises(CopyError, match=r"unpatch\(model\) first"):
                copy.deepcopy(part)
    assert torch.equal(family.decoder(copy.deepcopy(model)).rotary_emb.inv_freq, before)


def test_models_with_scaled_positions_are_refused(family: Family) -> None:
    model = family.build()
    family.decoder(model).rotary_emb.rope_type = "linear"
    with pytest.raises(UnsupportedModelError, match="linear"):
        tokencomp.extend_visual_context(model, 100)


# -- prompts beyond the window, in every kind of patch and turn -----------------------------------

PATCHES: dict[str, dict[str, Any]] = {
    "unpatched": {},
    "off": {"ratio": 0.0, "reducer": "pool"},
    "patched": {"ratio": 0.5, "reducer": "uniform"},
    "between layers": {"ratio": 0.5, "reducer": "fastv"},
    "disabled": {"ratio": 0.5, "reducer": "uniform"},
}


@contextlib.contextmanager
def extended(model: Any, kind: str, target: int) -> Iterator[None]:
    """Extend the window to `target` tokens, with one of `PATCHES`."""
    with contextlib.ExitStack() as stack:
        if kind == "unpatched":
            stack.enter_context(tokencomp.extend_visual_context(model, target))
        else:
            patch = tokencomp.patch(model, **PATCHES[kind], extend_context=target)
            handle = stack.enter_context(patch)
            if kind == "disabled":
                stack.enter_context(handle.disabled())
        yield


@pytest.mark.parametrize("kind", PATCHES)
def test_too_many_tokens_in_one_call(family: Family, kind: str) -> None:
    model, media = family.build(), family.video(4)
    inputs = family.batch([[text(3), media, text(4, 2)], [text(40)]])
    visual = sum(token in (IMAGE, VIDEO) for token in media.ids)
    with torch.no_grad():
        with (
            extended(model, kind, visual - 1),
            pytest.raises(SpanError, match=f"sample 0 has .* extended to {visual - 1}"),
        ):
            model(**inputs)
        with extended(model, kind, len(media.ids)):
            model(**inputs)


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("with_cache", [True, False])
def test_earlier_turns_count(kind: str, with_cache: bool) -> None:
    """Visual tokens in a cache count, also in its copies and in the user's cache; text does not."""
    family = FAMILIES["llava"]
    model, media = family.build(), family.image()
    visual = media.ids.count(IMAGE)
    turn = family.batch([[text(30), media, text(4, 2)]])
    width = turn["input_ids"].shape[1]
    cache = DynamicCache() if with_cache else None
    with torch.no_grad(), extended(model, kind, 2 * visual):
        for turns in (1, 2, 3):
            turn["attention_mask"] = torch.ones(1, turns * width).long()
            call = {**turn, "past_key_values": copy.deepcopy(cache), "use_cache": True}
            if turns < 3:
                cache = model(**call).past_key_values
                continue
            with pytest.raises(SpanError, match=f"has {visual} .*, after {2 * visual} in the"):
                model(**call)


def test_all_rows_of_an_older_cache_count() -> None:
    """Rows from before the extension may all be visual."""
    model, media = FAMILIES["llava"].build(), FAMILIES["llava"].image()
    cache = model(input_ids=torch.tensor([text(9)]), use_cache=True).past_key_values
    with (
        tokencomp.extend_visual_context(model, len(media.ids)),
        pytest.raises(SpanError, match="after 9 in the cache"),
    ):
        model(**FAMILIES["llava"].batch([[media]]), past_key_values=cache)
