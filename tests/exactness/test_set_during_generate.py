"""`set` from another thread, at every point of a `generate` call that runs under a tower stage."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import oracle
from support.families import Family, text

import tokencomp
from tokencomp.adapters.base import ENCODED
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import SpanError

FAMILY_NAMES = ["internvl", "llava_onevision", "qwen2_vl", "qwen3_vl"]
TOWER = {"ratio": 0.75, "reducer": "uniform", "tower_ratio": 0.5}
NO_TOWER = {**TOWER, "tower_ratio": 0.0}
EVEN, RANDOM = ({**TOWER, "tower_reducer": name} for name in ("uniform", "random"))
OFF = {**NO_TOWER, "ratio": 0.0}
SETTINGS = [(TOWER, NO_TOWER), (NO_TOWER, TOWER), (EVEN, RANDOM), (OFF, TOWER)]


def points(family: Family, model: Any) -> dict[str, tuple[Any, bool]]:
    """Modules at which `set` arrives, and whether it does so behind them."""
    layout = adapter_for(model).tower_layout()
    decoder = family.decoder(model)
    return {
        "before the tower": (layout.module, False),
        "within the tower": (layout.blocks[-1], False),
        "behind the tower": (layout.module, True),
        "before the decoder": (decoder, False),
        "within the decoder": (decoder.layers[2], False),
        "behind the decoder": (decoder, True),
    }


def run_with(module: Any, behind: bool, call: Callable[[], Any], change: Callable[[], Any]) -> Any:
    """Run `call`, in which `change` starts in another thread where `module` runs first."""
    threads: list[threading.Thread] = []

    def start(*_: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=change))
            threads[0].start()
            threads[0].join(0.05)
            waits.append(threads[0].is_alive())

    waits: list[bool] = []
    register = module.register_forward_hook if behind else module.register_forward_pre_hook
    hook = register(start)
    try:
        return call()
    finally:
        hook.remove()
        threads[0].join(60)
        assert waits == [True] and not threads[0].is_alive()


@pytest.mark.thin(4)
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_generate_is_whole(family: Family, number: int) -> None:
    """The output is that of the first setting, and the next call has the second."""
    model, (first, second) = family.build(), SETTINGS[number]
    inputs = family.batch([[text(3), family.image(0), text(5, 2)]])

    def generate() -> torch.Tensor:
        return torch.stack(oracle.generate(model, inputs, 3).logits)

    with tokencomp.patch(model, **first) as handle, torch.no_grad():
        expected = [generate(), [handle.set(**second), generate()][1]]
        assert (expected[0] - expected[1]).abs().max() > 1e-3
        for module, behind in points(family, model).values():
            handle.set(**first)
            found = run_with(module, behind, generate, lambda: handle.set(**second))
            assert torch.equal(found, expected[0])
            assert torch.equal(generate(), expected[1])


def test_unpatch_waits(family: Family) -> None:
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(5, 2)]])

    def generate() -> torch.Tensor:
        return torch.stack(oracle.generate(model, inputs, 3).logits)

    with torch.no_grad():
        plain = generate()
        for module, behind in points(family, model).values():
            handle = tokencomp.patch(model, **TOWER)
            expected = generate()
            found = run_with(module, behind, generate, handle.remove)
            assert torch.equal(found, expected)
            assert torch.equal(generate(), plain)


@pytest.mark.parametrize("reducer", ["uniform", "random", "condiv", None])
def test_features_of_another_tower_setting_are_refused(family: Family, reducer: str | None) -> None:
    """Also where the rows that are left happen to be those that the reducer takes."""
    model = family.build()
    if ENCODED not in inspect.signature(model.forward).parameters:
        pytest.skip("the release encodes media within the model")
    inputs = family.batch([[text(3), family.image(0), text(5, 2)]])
    names = ("pixel_values", "image_grid_thw", "image_sizes")
    media = {k: inputs[k] for k in names if k in inputs}
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with tokencomp.patch(model, **TOWER), torch.no_grad():
        features = model.model.get_image_features(**media)
    tokencomp.patch(model, 0.75 if reducer else 0.0, reducer=reducer or "uniform")
    with pytest.raises(SpanError, match=r"dropped in the vision tower|pass pixels"):
        model(**rest, **{ENCODED: {"image": features}})
