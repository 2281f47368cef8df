"""The extended visual window is compared with the formula of YaRN in plain loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.families import FAMILIES, Family, text

import tokencomp
from tokencomp.context_window import VISUAL_WINDOW, yarn
from tokencomp.errors import UnsupportedModelError

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


def test_a_copy_is_extended_and_restored_by_itself() -> None:
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    rotary = family.decoder(model).rotary_emb
    plain = rotary.inv_freq
    with tokencomp.extend_visual_context(model, 400, window=100):
        twin = copy.deepcopy(model)
        copied, scaled = family.decoder(twin).rotary_emb, rotary.inv_freq
        tokencomp.unpatch(twin)
        assert torch.equal(copied.inv_freq, plain)
        assert rotary.inv_freq is scaled and not torch.equal(scaled, plain)
    assert rotary.inv_freq is plain


def test_models_with_scaled_positions_are_refused(family: Family) -> None:
    model = family.build()
    family.decoder(model).rotary_emb.rope_type = "linear"
    with pytest.raises(UnsupportedModelError, match="linear"):
        tokencomp.extend_visual_context(model, 100)
