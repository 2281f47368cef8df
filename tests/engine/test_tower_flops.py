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
from support.hooks import prompt
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
