"""A patch that compresses nothing installs nothing; a change of it reaches whole calls alone."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support import oracle, plans
from support.families import FAMILIES, Family, text
from support.hooks import prompt
from torch import nn

import tokencomp

FAMILY_NAMES = ["qwen2_vl", "llava_onevision"]
OFF = {"ratio": 0.0, "reducer": "uniform"}
PACKAGE = str(Path(tokencomp.__file__).parent)


def installed(model: nn.Module) -> list[int]:
    """Hooks and methods of its own that every module has."""
    own = ("forward", "generate", "generate_batch", "_prefill")
    return [
        len(m._forward_pre_hooks) + len(m._forward_hooks) + sum(name in vars(m) for name in own)
        for m in model.modules()
    ]


def functions(run: Any) -> list[str]:
    """Functions of the library that `run` enters."""
    names = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("setting", [OFF, {"plan": []}, {**OFF, "strict": True}])
def test_nothing_of_ours_runs(family: Family, setting: dict[str, Any]) -> None:
    model, inputs = family.build(), prompt(family)
    gc.collect()  # caches of other tests would need hooks
    expected = oracle.generate(model, inputs, 3)  # modules may hook themselves at their first call
    clean = installed(model)
    with tokencomp.patch(model, **setting) as handle:
        assert installed(model) == clean
        assert functions(lambda: oracle.generate(model, inputs, 3)) == []
        handle.set(**(setting if "plan" in setting else OFF))
        out = oracle.generate(model, inputs, 3)
        assert installed(model) == clean
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


def test_stats_say_how_to_count() -> None:
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), prompt(family)
    with tokencomp.patch(model, **OFF) as handle, torch.no_grad():
        model(**inputs)
        assert not handle.stats and handle.stats.tokens_before == []
        for words in (str(handle.stats), repr(handle)):
            assert "prompt_lengths" in words
        handle.set(ratio=0.5)
        assert "prompt_lengths" not in repr(handle)


def test_hooks_stay_while_a_cache_may_need_them() -> None:
    """A patch that has compressed nothing yet has no hooks at ratio 0."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    clean = installed(model)
    with tokencomp.patch(model, **OFF) as handle:
        assert installed(model) == clean
        handle.set(ratio=0.5)
        hooked = installed(model)
        handle.set(**OFF)
        assert installed(model) == hooked != clean


def test_a_plan_reaches_whole_calls_alone(family: Family) -> None:
    """A direct call that began without hooks is uncompressed, whenever the change comes."""
    model, decoder = family.build(), None
    inputs = family.batch([[text(3), family.image(0), text(5, 2)]])
    decoder = family.decoder(model)
    on = {"ratio": 0.5, "reducer": "uniform"}
    with torch.no_grad():
        plain = model(**inputs).logits
        for module in (decoder, decoder.layers[1]):
            with tokencomp.patch(model, strict=True, **OFF) as handle:
                threads: list[threading.Thread] = []

                def start(*_: Any, threads: Any = threads, handle: Any = handle) -> None:
                    if not threads:
                        threads.append(threading.Thread(target=lambda: handle.set(**on)))
                        threads[0].start()
                        threads[0].join(60)

                with module.register_forward_pre_hook(start):
                    found = model(**inputs).logits
                assert torch.equal(found, plain)
                assert (model(**inputs).logits - plain).abs().max() > 1e-4
                assert handle.stats.ratio > 0.4


@pytest.mark.long
def test_what_was_compiled_follows_patch_and_unpatch() -> None:
    """Dynamo does not look whether hooks have come or gone since it compiled a call."""
    family = FAMILIES["llava_onevision"]
    model, inputs = family.build(), prompt(family)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = model(**inputs).logits
        assert torch.equal(compiled(**inputs).logits, plain)
        for _ in range(2):
            with tokencomp.patch(model, plan=plans.make("entry", family.layers)) as handle:
                out = compiled(**inputs).logits
                assert handle.stats and (out - plain).abs().max() > 1e-4
            assert torch.equal(compiled(**inputs).logits, plain)
