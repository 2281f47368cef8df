"""Hooks on layers: calls of several threads, and layers that run without them."""

from __future__ import annotations

import threading

import pytest
import torch
from support import oracle
from support.caches import LAYERS, ragged, single
from support.families import FAMILIES

import tokencomp
from tokencomp.errors import UnsupportedModelError

FAMILY = FAMILIES["qwen2_vl"]


def test_threads_decode_while_others_read_prompts() -> None:
    """Every answer is that of one thread alone."""
    model, prompts = FAMILY.build(), [single(FAMILY), ragged(FAMILY), single(FAMILY, 1)]
    with tokencomp.patch(model, 0.5, reducer="fastv"):
        expected = [oracle.generate(model, inputs, 6).sequences for inputs in prompts]
        errors: list[Exception] = []

        def run(number: int) -> None:
            try:
                for _ in range(4):
                    out = oracle.generate(model, prompts[number], 6).sequences
                    assert torch.equal(out, expected[number])
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number % 3,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]


def test_layers_without_their_hooks_are_an_error() -> None:
    """What torch.compile made before there were hooks does not run a prompt uncompressed."""
    model = FAMILY.build()
    with tokencomp.patch(model, plan=LAYERS):
        for layer in FAMILY.decoder(model).layers:
            layer._forward_pre_hooks.clear()
        with pytest.raises(UnsupportedModelError, match=r"torch\.compile"):
            model(**single(FAMILY))
