"""Changes from another thread at every point of a `generate` call under a tower stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import oracle
from support.families import Family, text

import tokencomp
from tokencomp.adapters.base import ENCODED
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import ModelInUseError, SpanError

FAMILY_NAMES = ["internvl", "llava_onevision", "qwen2_vl", "qwen3_vl"]
TOWER = {"ratio": 0.75, "reducer": "uniform", "tower_ratio": 0.5}
NO_TOWER = {**TOWER, "tower_ratio": 0.0}
EVEN, RANDOM = ({**TOWER, "tower_reducer": name} for name in ("uniform", "random"))
SETTINGS = [(TOWER, NO_TOWER), (NO_TOWER, TOWER), (EVEN, RANDOM)]


def points(family: Family, model: Any) -> dict[str, tuple[Any, bool]]:
    """Modules at which the change comes, and whether it comes after them."""
    layout = adapter_for(model).tower_layout()
    decoder = family.decoder(model)
    return {
        "before the tower": (layout.module, False),
        "within the tower": (layout.blocks[-1], False),
        "after the tower": (layout.module, True),
        "before the decoder": (decoder, False),
        "within the decoder": (decoder.layers[2], False),
        "after the decoder": (decoder, True),
    }


def run_with(module: Any, after: bool, call: Callable[[], Any], change: Callable[[], Any]) -> Any:
    """Run `call`, in which `change` comes from another thread where `module` runs first."""
    errors: list[BaseException] = []

    def change_in_a_thread(*_: Any) -> None:
        if not errors:
            with ThreadPoolExecutor(1) as pool, pytest.raises(ModelInUseError) as raised:
                pool.submit(change).result(60)
            errors.append(raised.value)

    register = module.register_forward_hook if after else module.register_forward_pre_hook
    hook = register(change_in_a_thread)
    try:
        return call()
    finally:
        hook.remove()
        assert errors


@pytest.mark.thin(3)
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_generate_is_whole(family: Family, number: int) -> None:
    """A change during a call is refused at every point, and the next one is taken."""
    model, (first, second) = family.build(), SETTINGS[number]
    inputs = family.batch([[text(3), family.image(0), text(5, 2)]])

    def generate() -> torch.Tensor:
        return torch.stack(oracle.generate(model, inputs, 3).logits)

    with torch.no_grad():
        plain = generate()
        handle = tokencomp.patch(model, **first)
        expected = [generate(), [handle.set(**second), generate()][1]]
        assert (expected[0] - expected[1]).abs().max() > 1e-3
        changes = (lambda: handle.set(**second), handle.remove, lambda: tokencomp.patch(model, 0.3))
        for (module, after), change in zip(
            points(family, model).values(), 2 * changes, strict=True
        ):
            handle.set(**first)
            assert torch.equal(run_with(module, after, generate, change), expected[0])
            handle.set(**second)
            assert torch.equal(generate(), expected[1])
        handle.remove()
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
