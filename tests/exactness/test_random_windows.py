"""Random batches under attention windows of every length, from below the prompt to above it.

Rows without media, with one and with several, and ratios by kind, so that a batch can be as wide
as before although some of its rows have lost or merged tokens. The oracle is the windowed
full-length run.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from support import kinds, oracle
from support.families import EOS, IMAGE, PAD, VOCAB, Family, text
from support.family.hybrid import HYBRID, with_window
from support.family.llava import Llava
from support.family.mistral import Mistral3
from support.family.qwen import Qwen2VL, text_config
from support.family.structural import STRUCTURAL

import tokencomp

STEPS = 6
# They read lengths of keys, raters of the question, the frame before, and nothing in a later layer.
NEWER = ("dart", "sparsevlm", "timechat", "mmtok+random")


class Mistral(Llava):
    """LLaVA on a decoder all of whose layers have a window."""

    name = "llava_mistral"

    def config(self) -> Any:
        config = super().config()
        config.text_config = transformers.MistralConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD, sliding_window=8,
        )  # fmt: skip
        return config


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


WINDOWED: dict[str, Family] = {"llava_mistral": Mistral(), "qwen2_vl_windows": WindowedQwen()}
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
    """A ratio for all media or by kind, at entry or between layers, with and without scores."""
    name = dice.choice(["uniform", "condiv", "fastv", "staged", "merging", "merging", *NEWER])
    if name == "merging":
        reducer, merge = dice.choice(["uniform", "kcenter"]), dice.choice([True, "auto"])
        return {"ratio": dice.choice([0.5, 0.75]), "reducer": reducer, "merge": merge}
    if name in NEWER:
        options = {"at": dice.choice([0.5, 0.75])} if name.endswith("random") else {}
        return {"ratio": dice.choice([0.25, 0.5, 0.75]), "reducer": name, **options}
    if name == "staged":
        uniform = tokencomp.make_reducer("uniform")
        stages = tokencomp.Stage(0, 0.7, uniform), tokencomp.Stage(2, 0.3, uniform)
        return {"plan": tokencomp.Plan(stages)}
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
    width = inputs["input_ids"].shape[1]
    with tokencomp.patch(model, **setting) as handle, torch.no_grad():
        out = oracle.generate(model, inputs, steps, suppress_tokens=[*range(IMAGE, IMAGE + 5)])
        masks = oracle.kept_columns(handle, inputs, family.layers)
        with handle.disabled():
            plain = model(**inputs).logits[:, -1]
    merged, merge = None, setting.get("merge", False)
    if merge:
        merged = oracle.Merged(handle, frozenset({"image"}) if merge == "auto" else None)
    new = out.sequences[:, width:-1]
    expected = kinds.expected_logits(model, family, inputs, masks, new, merged)[:, width - 1 :]
    found = torch.stack(out.logits, 1).to(expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    return float((out.logits[0] - plain).abs().max())


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
    effects = [check_random(WINDOWED[name], 100 * part + seed) for seed in range(12)]
    assert max(effects) > 1e-2


@pytest.mark.long
@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("part", range(2, 5))
def test_more_random_batches(name: str, part: int) -> None:
    for seed in range(40):
        check_random(WINDOWED[name], 100 * part + seed)


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
def test_a_longer_row_hides_neither_gaps_nor_repetitions(
    name: str, merge: Any, longest: str
) -> None:
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
