"""A handle that is changed while other threads use the model."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.families import FAMILIES, text

import tokencomp
from tokencomp.errors import ModelInUseError

NAMES = ["qwen2_vl", "qwen3_vl", "llava_onevision", "internvl"]
SETTINGS = [
    {"reducer": "fastv", "ratio": 0.5},
    {"reducer": "uniform", "ratio": 0.75},
    {"reducer": "condiv", "ratio": 0.3},
    {"reducer": "uniform", "ratio": 0.0},
]


@pytest.mark.parametrize("name", NAMES)
def test_set_while_others_call(name: str) -> None:
    """Every call is whole: its logits are those of one of the settings."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)]])

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


def test_threads_that_patch_one_model_leave_nothing_behind() -> None:
    """Every patch replaces one of another thread, or is replaced; in the end all are gone."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)]])
    errors: list[BaseException] = []

    @torch.no_grad()
    def work(ratio: float) -> None:
        try:
            for _ in range(6):
                with contextlib.suppress(ModelInUseError):
                    tokencomp.patch(model, ratio, reducer="uniform")
                model(**inputs, use_cache=False)
                with contextlib.suppress(ModelInUseError):
                    tokencomp.unpatch(model)
        except Exception as error:
            errors.append(error)

    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        threads = [threading.Thread(target=work, args=(ratio,)) for ratio in (0.3, 0.5, 0.7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tokencomp.unpatch(model)
        assert torch.equal(model(**inputs, use_cache=False).logits, before)
    assert not errors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_call_that_was_interrupted_blocks_nobody(error: type[BaseException]) -> None:
    """Its end is counted, and the next call runs through the hooks again."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    inputs = family.batch([[text(3), family.image(0), text(9, 3)]])

    def interrupt(*_: object) -> None:
        raise error

    with torch.no_grad(), tokencomp.patch(model, 0.5, reducer="uniform") as handle:
        before = model(**inputs, use_cache=False).logits
        hook = family.decoder(model).layers[1].register_forward_pre_hook(interrupt)
        for call in (model, model.forward, model.generate):
            with pytest.raises(error):
                call(**inputs)
        hook.remove()
        handle.set(ratio=0.25).set(ratio=0.5)
        assert torch.equal(model.forward(**inputs, use_cache=False).logits, before)
