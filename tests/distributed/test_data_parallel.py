"""Training steps under DDP and FSDP, and the wrappers that patch() and unpatch() look through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import ranks
from support.families import FAMILIES
from torch import nn

import tokencomp
from tokencomp.adapters.registry import unwrap
from tokencomp.errors import UnsupportedModelError

pytestmark = pytest.mark.long

WAYS = [
    ("ddp", "condiv", "wrap"),
    ("ddp", "prune", "patch"),
    ("fsdp2", "condiv", "patch"),
    ("fsdp2", "condiv", "wrap"),
    ("fsdp2", "pyramiddrop", "wrap"),
    ("fsdp2", "prune", "patch"),
    ("fsdp2-attention", "kcenter", "wrap"),
    ("fsdp2-attention", "prune", "patch"),
    ("fsdp2-attention", "prune", "wrap"),
]


CASES = [("qwen2_vl", *case) for case in WAYS] + [("llava_onevision", *case) for case in WAYS[:4]]


@pytest.fixture(scope="module")
def steps() -> list[Any]:
    return ranks.run_ranks(ranks.data_parallel, 2, CASES)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_training_step_is_that_of_one_process(steps: list[Any], case: tuple[str, ...]) -> None:
    for rank in steps:
        (expected, kept), (found, kept_too) = rank[case]
        assert kept_too == kept
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            torch.testing.assert_close(found[parameter], value, atol=1e-6, rtol=1e-4, msg=parameter)


def test_data_parallel_copies_are_refused() -> None:
    """Before the call where the wrapper is patched, and in it where the model was before."""
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    wrapper: Any = nn.DataParallel(model)
    wrapper.device_ids = [0, 1]
    with pytest.raises(UnsupportedModelError, match="DistributedDataParallel"):
        tokencomp.patch(wrapper, 0.5)
    tokencomp.patch(model, 0.5)
    with pytest.raises(UnsupportedModelError, match="DistributedDataParallel"):
        model._replicate_for_data_parallel()  # what `nn.DataParallel` calls


def test_wrappers_in_any_order() -> None:
    peft = pytest.importorskip("peft")
    model = FAMILIES["qwen2_vl"].build()
    config = peft.LoraConfig(target_modules=["q_proj"])
    lora = peft.get_peft_model(model, config)
    for outer in (
        nn.DataParallel(lora),
        nn.DataParallel(torch.compile(lora, backend="eager")),
        torch.compile(nn.DataParallel(lora), backend="eager"),
    ):
        assert unwrap(outer) is model
        handle = tokencomp.patch(outer, 0.5)
        assert unwrap(outer) is model and "removed" not in repr(handle)
        tokencomp.unpatch(outer)
        assert "removed" in repr(handle)
