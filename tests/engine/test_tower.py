"""Signals of the vision tower against oracles that do not know how patches become tokens.

Which patches a token is made of: with the tower's attention silenced nothing mixes, and the
gradient of a token reaches its own patches alone. Attention: Hugging Face's own eager weights.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from support.families import FAMILIES, IMAGE, VIDEO, Family, Media, text
from support.oracle import decoder_inputs
from support.tower import deep
from torch import Tensor

import tokencomp
from tokencomp import Kept, Reducer, Tokens, make_reducer
from tokencomp.adapters.registry import adapter_for
from tokencomp.adapters.towers.base import attention_blocks
from tokencomp.errors import OptionError, SpanError
from tokencomp.plan.plan import Plan, Stage, TowerStage
from tokencomp.tokens.signals import TOWER_ATTENTION, TOWER_KEYS, Attention, Signal, TowerSignal

FAMILY_NAMES = sorted(FAMILIES)

SEEN: list[Tokens] = []
# Hidden state of the tower that the model uses, where it is not the last one.
LAYERS = dict.fromkeys(("LLaVA-1.5", "LLaVA-NeXT", "LLaVA-NeXT-Video", "VILA"), -2)
OUTPUTS = ("out_proj", "proj", "projection_layer")


@dataclass(frozen=True)
class Spy(Reducer):
    """Notes what it sees; keeps the first tokens."""

    name: ClassVar[str] = "spy"
    signals: tuple[Signal, ...] = (TOWER_KEYS,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset(self.signals)

    def reduce(self, tokens: Tokens) -> Kept:
        SEEN.append(tokens)
        return Kept(torch.arange(tokens.budgets[0]))


def spied(model: Any, inputs: dict[str, Any], *signals: Signal, **generate: Any) -> list[Tokens]:
    SEEN.clear()
    plan = Plan((Stage(0, 0.8, Spy(signals=signals)),))
    with tokencomp.patch(model, plan=plan), torch.no_grad():
        if generate:
            model.generate(**inputs, do_sample=False, **generate)
        else:
            model(**inputs, use_cache=False)
    return list(SEEN)


def watched(model: Any, block: int = -1) -> Any:
    """The attention of a block, counted among those whose output the model uses."""
    layer = LAYERS.get(adapter_for(model).family, -1)
    blocks = attention_blocks(adapter_for(model).tower)
    return blocks[: len(blocks) + 1 + layer][block]


def prompts(family: Family) -> dict[str, Tensor]:
    """Ragged: two images of different grids, a video, an image between text."""
    first = [text(3), family.image(0), text(2, 2), family.image(1), text(5)]
    last = [text(9), family.image(2), text(2)]
    return family.batch([first, [family.video(), text(4, 3)], last])


def members(model: Any, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Input of the watched attention per tower call, and which of its rows make each column.

    Returns
    -------
    hidden
        Per call (rows, d).
    rows
        Per sample and column, a mask over the rows of all calls.
    """
    leaves: list[Tensor] = []
    embeds: list[Tensor] = []
    attn = watched(model)
    for block in attention_blocks(adapter_for(model).tower):
        out = next(getattr(block, n) for n in OUTPUTS if hasattr(block, n))
        torch.nn.init.zeros_(out.weight)

    def leaf(module: Any, args: Any, kwargs: Any) -> Any:
        x = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        leaves.append(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    # the residual branch passes by the attention: the leaf must be the block's input
    name = next(n for n, m in model.named_modules() if m is attn).rpartition(".")[0]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(leaf, with_kwargs=True),
        adapter_for(model).decoder.register_forward_pre_hook(
            lambda _, a, k: embeds.append(k["inputs_embeds"]), with_kwargs=True
        ),
    ]
    found: list[Tensor] = []
    handles.append(
        attn.register_forward_pre_hook(
            lambda _, a, k: found.append((a[0] if a else k["hidden_states"]).detach()),
            with_kwargs=True,
        )
    )
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    rows = []
    for b in range(len(embeds[0])):
        rows.append([])
        for column in embeds[0][b]:
            grads = (
                torch.autograd.grad(
                    column.sum(),
                    leaves,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                if column.requires_grad
                else [torch.zeros_like(x) for x in leaves]
            )
            rows[-1].append(torch.cat([g.flatten(0, -2).abs().sum(-1) > 0 for g in grads]))
    return [x.flatten(0, -2) for x in found], rows


def keys(attn: Any, rows: Tensor) -> Tensor:
    """Keys from the weights alone."""
    if hasattr(attn, "qkv"):
        weight, bias = attn.qkv.weight.chunk(3)[1], attn.qkv.bias.chunk(3)[1]
        return rows @ weight.T + bias
    made = rows @ attn.k_proj.weight.T
    return made if attn.k_proj.bias is None else made + attn.k_proj.bias


def check(rows: list[list[Tensor]], values: Tensor, got: list[Tensor]) -> None:
    """`got` of every span is the mean of `values` over the `rows` each token is made of."""
    expected = [values[m].mean(0) for row in rows for m in row if m.any()]
    found = torch.cat([values.view(len(values), -1) for values in got])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_keys_are_those_of_a_tokens_own_patches(family: Family) -> None:
    model, inputs = family.build(), prompts(family)
    hidden, rows = members(model, inputs)  # silences the tower's attention for good
    got = [t.tower[TOWER_KEYS] for t in spied(model, inputs, TOWER_KEYS)]
    check(rows, keys(watched(model), torch.cat(hidden)), got)


def test_keys_of_a_tower_that_sorts_its_patches_by_window() -> None:
    """Only that of Qwen2.5-VL does, a family that plain pytest leaves out."""
    test_keys_are_those_of_a_tokens_own_patches(FAMILIES["qwen2_5_vl"])


def attention_of(
    model: Any, inputs: dict[str, Tensor], blocks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """What every row of the tower receives in each of `blocks`, from eager attention weights."""
    weights: dict[Any, list[Tensor]] = {block: [] for block in blocks}
    module = sys.modules[type(blocks[0]).__module__]
    run = module.eager_attention_forward

    def eager(module: Any, *args: Any, **kwargs: Any) -> Any:
        out, found = run(module, *args, **kwargs)
        if module in weights:
            weights[module].append(found.detach().float().mean(1))
        return out, found

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(module, "eager_attention_forward", eager)
        model(**inputs, use_cache=False)
    first = adapter_for(model).class_token
    return [
        torch.cat([(w[:, 0] if first else w.mean(1)).flatten() for w in weights[block]])
        for block in blocks
    ]


def test_attention_is_what_eager_attention_says(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two blocks at once, with the keys of one and the decoder's attention beside them."""
    family = deep(family, 4)
    model, inputs = family.build("eager"), prompts(family)
    _, rows = members(model, inputs)  # silences the tower's attention for good
    used = 5 + LAYERS.get(adapter_for(model).family, -1)
    last, middle = TOWER_ATTENTION, TowerSignal("attention", 0.5)
    blocks = [watched(model), watched(model, used // 2)]
    expected = attention_of(model, inputs, blocks, monkeypatch)
    alone = [t.scores for t in spied(model, inputs, Attention("text"))]
    seen = spied(model, inputs, last, middle, TOWER_KEYS, Attention("text"))
    for signal, received in zip((last, middle), expected, strict=True):
        check(rows, received[:, None], [t.tower[signal] for t in seen])
    assert not torch.allclose(*expected)
    assert all(torch.equal(t.scores, s) for t, s in zip(seen, alone, strict=True))


@pytest.mark.parametrize(("name", "patches"), [("qwen2_vl", 4), ("llava", 1)])
def test_attention_among_the_patches_that_the_tower_keeps(
    name: str, patches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stage in the tower the softmax is over the rows of one picture that stay."""
    family = deep(FAMILIES[name], 4)
    model = family.build("eager")
    rows = [[text(3), family.image(0), text(2, 2), family.image(1), text(5)]]
    signal, stage = TowerSignal("attention", -2), TowerStage(1, 0.5, make_reducer("random"))
    plan = Plan((Stage(0, 0.2, Spy(signals=(signal,))),), stage)
    SEEN.clear()
    with tokencomp.patch(model, plan=plan):
        (received,) = attention_of(model, family.batch(rows), [watched(model, -2)], monkeypatch)
    if adapter_for(model).class_token:  # the first row of both pictures
        received = received.view(2, -1)[:, 1:].flatten()
    expected = received.view(-1, patches).mean(1)  # rows of a token stand side by side, in order
    found = torch.cat([t.tower[signal] for t in SEEN])
    assert len(SEEN) == 2 and all(t.index is not None for t in SEEN)
    torch.testing.assert_close(found, expected)


def test_a_block_that_the_tower_does_not_use_is_refused() -> None:
    family = deep(FAMILIES["llava_next"])  # reads hidden state -2
    model = family.build()
    plan = Plan((Stage(0, 0.8, Spy(signals=(TowerSignal("keys", 2),))),))
    with pytest.raises(OptionError, match=r"reads block 2 .* uses the blocks 0 … 1"):
        tokencomp.patch(model, plan=plan)


def test_two_ways_to_read_the_decoder_are_refused() -> None:
    both = Spy(signals=(Attention("text"), Attention("last")))
    with pytest.raises(OptionError, match="in two ways"):
        tokencomp.patch(FAMILIES["llava"].build(), plan=Plan((Stage(0, 0.8, both),)))


def test_pooled_frames_have_bilinear_means() -> None:
    """LLaVA-OneVision: sides of 5 become 3; plain loops, pixel centres aligned."""
    family = FAMILIES["llava_onevision"]
    config = family.config()
    config.vision_config.image_size = 20
    model = family.model_class()(config).eval()
    video = Media([VIDEO] * (4 * 9 + 1), {"pixel_values_videos": torch.randn(1, 4, 3, 20, 20)})
    inputs = family.batch([[video, text(4)]])
    (hidden,), _ = members(model, inputs)
    (seen,) = spied(model, inputs, TOWER_KEYS)
    ((t, small, _),) = seen.grids
    side = round((len(hidden) // t) ** 0.5)
    grid = keys(watched(model), hidden).view(t, side, side, -1)
    weights = torch.zeros(small, side)
    for i in range(small):
        at = max((i + 0.5) * side / small - 0.5, 0.0)
        low = int(at)
        weights[i, low] += 1 - (at - low)
        weights[i, min(low + 1, side - 1)] += at - low
    expected = torch.einsum("ih,jw,thwd->tijd", weights, weights, grid)
    found = seen.tower[TOWER_KEYS].flatten(1)
    torch.testing.assert_close(found, expected.flatten(0, 2))


def test_generation_with_beams_sees_the_same(family: Family) -> None:
    """Newer releases encode media before they expand beams, older ones after."""
    rows = [[text(3), family.image(0), text(5)], [text(9), family.image(2), text(2)]]
    model = family.build()
    once = [
        [t.tower[TOWER_KEYS] for t in spied(model, family.batch([row]), TOWER_KEYS)] for row in rows
    ]
    both = spied(model, family.batch(rows), TOWER_KEYS, max_new_tokens=2, num_beams=2)
    expected = [keys for sample in once for keys in (*sample, *sample)]
    for tokens, keys in zip(both, expected, strict=True):
        torch.testing.assert_close(tokens.tower[TOWER_KEYS], keys)


def test_features_from_elsewhere_are_refused() -> None:
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("the release takes no precomputed features")
    inputs = family.batch([[family.image(0), text(4)]])
    pixels = {k: inputs.pop(k) for k in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        encoded = {"image": model.model.get_image_features(**pixels, return_dict=True)}
    inputs |= {"mm_encoder_outputs": encoded, "image_grid_thw": pixels["image_grid_thw"]}
    with pytest.raises(SpanError, match="did not run"):
        spied(model, inputs, TOWER_KEYS)


def test_a_failed_prompt_leaves_no_signals() -> None:
    """Its tower has run for other pictures than those of the next prompt, which has features."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    failed, inputs = (family.batch([[text(3), family.image(0), text(4)]]) for _ in range(2))
    embeds = decoder_inputs(family.build(), family, inputs)["inputs_embeds"]
    types = (inputs["input_ids"] == IMAGE).int()
    call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    call |= {"mm_token_type_ids": types, "position_ids": family.positions(model, inputs)}
    settings: list[dict[str, Any]] = [
        dict(ratio=0.5, reducer="visionzip"), dict(reducer="pixelprune", threshold=4),
    ]  # fmt: skip
    for setting in settings:
        with torch.no_grad(), tokencomp.patch(model, **setting) as handle:
            fail = family.decoder(model).register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
            with pytest.raises(ZeroDivisionError):
                model(**failed)
            fail.remove()
            if "ratio" in setting:
                with pytest.raises(SpanError, match="did not run"):
                    model(**call)
            else:
                model(**call)
                assert handle.stats.tower_flops == (0, 0)


def test_another_layer_in_a_call_is_refused() -> None:
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.batch([[text(3), family.image(0), text(6, 3)]])
    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="visionzip"):
        model(**inputs, vision_feature_layer=model.config.vision_feature_layer)
        with pytest.raises(OptionError, match=r"vision_feature_layer=-1 in a call"):
            model(**inputs, vision_feature_layer=-1)
