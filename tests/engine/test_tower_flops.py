"""FLOPs of tower and projector against those that the modules of a run carry out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import tower
from support.families import FAMILIES, Family
from support.prompts import prompt
from torch import nn

import tokencomp
from tokencomp import Plan, TowerStage, make_reducer
from tokencomp.adapters.registry import adapter_for

STAGE = Plan((), TowerStage(0, 0.6, make_reducer("random")))


@contextlib.contextmanager
def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts linear layers and attention of the tower's blocks, and linear layers of projectors."""
    layout = adapter_for(model).tower_layout()
    counts, inside = {"tower": 0, "projector": 0}, [False]

    def linear(part: str, module: nn.Linear, args: Any, out: Any) -> None:
        counts[part] += 2 * module.weight.numel() * (args[0].numel() // module.in_features)

    def attend(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        counts["tower"] += 4 * math.prod(q.shape) * k.shape[-2] if inside[0] else 0
        return original(q, k, *args, **kwargs)

    def enter(*_: Any) -> None:
        inside[0] = True

    def leave(*_: Any) -> None:
        inside[0] = False

    original = nn.functional.scaled_dot_product_attention
    with contextlib.ExitStack() as stack, monkeypatch.context() as patches:
        patches.setattr(nn.functional, "scaled_dot_product_attention", attend)
        parts = {"tower": [*layout.blocks, *layout.unused], "projector": layout.projectors}
        for part, modules in parts.items():
            for module in (m for top in modules for m in top.modules()):
                if isinstance(module, nn.Linear):
                    hook = lambda *a, part=part: linear(part, *a)  # noqa: E731
                    stack.enter_context(module.register_forward_hook(hook))
        for block in parts["tower"]:
            stack.enter_context(block.register_forward_pre_hook(enter))
            stack.enter_context(block.register_forward_hook(leave))
        yield counts


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen3_vl_moe"}))
def test_flops_are_those_of_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family: Family = tower.deep(FAMILIES[name])
    model, inputs = family.build(), prompt(family)
    with counted(model, monkeypatch) as full, torch.no_grad():
        model(**inputs)
    with tokencomp.patch(model, plan=STAGE) as handle, torch.no_grad():
        with counted(model, monkeypatch) as short:
            model(**inputs)
        assert handle.stats.tower_flops == (full["tower"], short["tower"])
        assert handle.stats.projector_flops == (full["projector"], short["projector"])
        assert short["tower"] < full["tower"]


class Packed(nn.Module):
    """A linear layer whose weight is packed into bytes, two numbers in each."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.linear = [linear]  # hidden: its weight is no parameter here
        size = linear.weight.numel() // 2
        self.weight = nn.Parameter(torch.zeros(size, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear[0](x)


class Named(Packed):
    """The same under another name, as GPTQ and AWQ have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("qweight", self.weight.data)
        del self.weight


def dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    names = r".*visual.*(qkv|fc1)"
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=names, r=2), model)


def replaced(kind: type[Packed]) -> Any:
    def change(model: nn.Module) -> nn.Module:
        linears = [n for n, m in model.visual.named_modules() if isinstance(m, nn.Linear)]
        for name in linears:
            model.visual.set_submodule(name, kind(model.visual.get_submodule(name)))
        return model

    return change


@pytest.mark.parametrize("change", [replaced(Packed), replaced(Named), dynamic, lora])
@torch.no_grad()
def test_flops_follow_features_and_not_the_form_of_weights(change: Any) -> None:
    family: Family = tower.deep(FAMILIES["qwen2_vl"])
    found = []
    for way in (nn.Module.eval, change):
        model = family.build()
        model.model = way(model.model)
        with tokencomp.patch(model, plan=STAGE) as handle:
            model(**prompt(family))
            stats = handle.stats
            patches = tuple(map(sum, zip(*(c.patches for c in stats.tower_costs), strict=True)))
            found.append((patches, *stats.tower_flops, *stats.projector_flops))
    patches, full, short, *projectors = found[0]
    assert found[1][3:] == tuple(projectors)
    if change is lora:  # two more products of rank 2
        block = adapter_for(model).tower_layout().blocks[0]
        extra = 2 * 2 * sum(m.in_features + m.out_features for m in (block.attn.qkv, block.mlp.fc1))
        assert (found[1][1] - full, found[1][2] - short) == tuple(extra * n for n in patches)
    else:
        assert found[1] == found[0]
