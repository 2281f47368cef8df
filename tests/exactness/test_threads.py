"""Many threads may call one patched model; while they do, a change of the patch is refused."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import Family, text
from support.prompts import prompt, ragged, single

import tokencomp
from tokencomp.adapters.base import ENCODED
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import ModelInUseError, SpanError

FAMILY_NAMES = ["internvl", "llava_onevision", "qwen2_vl", "qwen3_vl"]


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["both", "attention", plans.MERGED, "tower"])
def test_threads_that_prefill_and_decode(family: Family, name: str) -> None:
    """Prompts of different batches at the same time: every answer is that of one thread alone."""
    setting: dict[str, Any] = {"ratio": 0.5, "tower_ratio": 0.3}
    if name != "tower":
        setting = {"plan": plans.make(name, family.layers)}
    model, prompts = family.build(), [single(family), ragged(family), prompt(family)]
    with tokencomp.patch(model, **setting):
        expected = [oracle.generate(model, inputs, 4) for inputs in prompts]

        def work(number: int) -> bool:
            found = [oracle.generate(model, prompts[number % 3], 4) for _ in range(3)]
            return all(oracle.close(one, expected[number % 3]) for one in found)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


# -- changes while calls run -----------------------------------------------------------------------

SETTINGS = [
    {"reducer": "fastv", "ratio": 0.5},
    {"reducer": "uniform", "ratio": 0.75},
    {"reducer": "condiv", "ratio": 0.3},
    {"reducer": "uniform", "ratio": 0.0},
]


def test_set_while_others_call(family: Family) -> None:
    """Every call is whole: its logits are those of one of the settings."""
    model, inputs = family.build(), single(family)

    @torch.no_grad()
    def call() -> torch.Tensor:
        return model(**inputs, use_cache=False).logits

    expected, results = [], []
    with tokencomp.patch(model, 0.5) as handle, ThreadPoolExecutor(3) as pool:
        for setting in SETTINGS:
            handle.set(**setting)
            expected.append(call())
        for number in range(8):
            running = [pool.submit(call) for _ in range(6)]
            while not all(one.done() for one in running):
                with contextlib.suppress(ModelInUseError):
                    handle.set(**SETTINGS[number % len(SETTINGS)])
                time.sleep(0.001)
            results += [one.result() for one in running]
            handle.set(**SETTINGS[(number + 1) % len(SETTINGS)])
    for logits in results:
        assert any(torch.allclose(logits, other, atol=1e-5) for other in expected)


TOWER = {"ratio": 0.75, "reducer": "uniform", "tower_ratio": 0.5}
NO_TOWER = {**TOWER, "tower_ratio": 0.0}
EVEN, RANDOM = ({**TOWER, "tower_reducer": name} for name in ("uniform", "random"))
CHANGES = [(TOWER, NO_TOWER), (NO_TOWER, TOWER), (EVEN, RANDOM)]


def points(family: Family, model: Any) -> list[tuple[Any, bool]]:
    """Modules at which the change comes, and whether it comes after them."""
    layout = adapter_for(model).tower_layout()
    decoder = family.decoder(model)
    return [
        (layout.module, False), (layout.blocks[-1], False), (layout.module, True),
        (decoder, False), (decoder.layers[2], False), (decoder, True),
    ]  # fmt: skip


def run_with(module: Any, after: bool, call: Callable[[], Any], change: Callable[[], Any]) -> Any:
    """Run `call`, in which `change` comes from another thread where `module` runs first."""
    errors: list[BaseException] = []

    def change_in_a_thread(*_: Any) -> None:
        if not errors:
            with ThreadPoolExecutor(1) as pool, pytest.raises(ModelInUseError) as raised:
                pool.submit(change).result(60)
            errors.append(raised.value)

    register = module.register_forward_hook if after else module.register_forward_pre_hook
    with register(change_in_a_thread):
        result = call()
    assert errors
    return result


@pytest.mark.thin(3)
@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_generate_is_whole(family: Family, number: int) -> None:
    """A change during a call is refused at every point, and the next one is taken."""
    model, (first, second) = family.build(), CHANGES[number]
    inputs = family.batch([[text(3), family.image(0), text(5, 2)]])

    def generate() -> torch.Tensor:
        return torch.stack(oracle.generate(model, inputs, 3).logits)

    with torch.no_grad():
        plain = generate()
        handle = tokencomp.patch(model, **first)
        expected = [generate(), [handle.set(**second), generate()][1]]
        assert oracle.difference(*expected) > 1e-3
        changes = (lambda: handle.set(**second), handle.remove, lambda: tokencomp.patch(model, 0.3))
        for (module, after), change in zip(points(family, model), 2 * changes, strict=True):
            handle.set(**first)
            assert torch.equal(run_with(module, after, generate, change), expected[0])
            handle.set(**second)
            assert torch.equal(generate(), expected[1])
        handle.remove()
        assert torch.equal(generate(), plain)


@pytest.mark.parametrize("reducer", ["uniform", "condiv", None])
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
