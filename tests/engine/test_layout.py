"""Moving everything that has a sequence axis: against loops, and one launch per stage."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch
from support.families import FAMILIES, text
from torch import Tensor

import tokencomp
from tokencomp import Plan, Reduction, Stage, make_reducer
from tokencomp.engine.gather import take
from tokencomp.engine.rowmap import KeptSpan, Prompt, RowMap, text_values
from tokencomp.tokens.spans import VisualSpan


def by_hand(x: Tensor, index: Tensor, dim: int, valid: Tensor) -> Tensor:
    """Column by column; the batch axis stands before the sequence axis."""
    x = x.movedim((dim - 1, dim), (0, 1))
    out = torch.zeros(*index.shape, *x.shape[2:], dtype=x.dtype)
    for b, row in enumerate(index.tolist()):
        for column, source in enumerate(row):
            if valid[b, column]:
                out[b, column] = x[b if x.shape[0] > 1 else 0, source]
    return out.movedim((0, 1), (dim - 1, dim))


@pytest.mark.parametrize("padded", [False, True])
def test_take(padded: bool) -> None:
    """Hidden states, shared and M-RoPE tables, positions and masks together; 0 at padding."""
    tensors = [
        torch.randn(2, 6, 5),
        torch.randn(1, 6, 4),
        torch.randn(3, 2, 6, 4).bfloat16(),
        torch.arange(36).view(3, 2, 6),
        torch.arange(6)[None].expand(2, -1),
        torch.rand(2, 6) > 0.5,
    ]
    dims = [1, 1, -2, -1, 1, 1]
    index = torch.tensor([[0, 0, 2, 5], [0, 1, 3, 4]])
    valid = torch.ones(2, 4, dtype=torch.bool)
    if padded:
        valid[0, :1] = False
    got = take(tensors, index, dims, valid if padded else None)
    for x, dim, out in zip(tensors, dims, got, strict=True):
        assert torch.equal(out, by_hand(x, index, dim % x.ndim, valid))


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_one_launch_per_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and positions, or hidden states and both rotary tables, move together.

    The kernels (interpreted) copy the same bits as PyTorch, so the logits are the same too.
    """
    pytest.importorskip("triton")
    gather = importlib.import_module("tokencomp.kernels.gather_rows.triton")
    family = FAMILIES[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, uniform = family.build().to(device), make_reducer("uniform")
    inputs = family.batch(
        [[text(3), family.image(0), text(4)], [text(2), family.image(1), text(3), family.image(2)]]
    )
    inputs = {name: value.to(device) for name, value in inputs.items()}
    plan = Plan(tuple(Stage(layer, 0.8 - layer / 5, uniform) for layer in (0, 1, 3)))
    logits, launches = {}, {}
    with tokencomp.patch(model, plan=plan), torch.no_grad():
        for backend in ("naive", "triton"):
            monkeypatch.setenv("TOKENCOMP_KERNELS", backend)
            with mock.patch.object(gather, "launch", wraps=gather.launch) as launch:
                logits[backend] = model(**inputs, use_cache=False).logits
            launches[backend] = launch.call_count
    assert torch.equal(logits["naive"], logits["triton"])
    assert launches == {"naive": 0, "triton": 3}


def test_a_frame_moves_as_a_whole() -> None:
    """No tensor of a map, its spans included, stays on the device of the stage before."""

    def tensors(value: object) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, (list, tuple)):
            return [t for item in value for t in tensors(item)]
        if isinstance(value, (RowMap, KeptSpan)):
            return [t for item in vars(value).values() for t in tensors(item)]
        return []

    span = VisualSpan(1, 4, (1, 2, 2))
    keep = Reduction(torch.tensor([0, 2]), sizes=torch.tensor([2.0, 2.0]))
    before = RowMap.of_prompt(6, [6], [[span]])
    rows, *_ = before.keep([[2]], [(0, 0)], keep, torch.device("cpu"))
    moved = rows.to(torch.device("meta"))
    assert len(tensors(moved)) == len(tensors(rows)) == 2
    assert all(t.is_meta for t in tensors(moved)) and not any(t.is_meta for t in tensors(rows))


def test_text_of_packed_prompts() -> None:
    """Rows of one, two and no prompts; a prompt without an image is text as a whole."""
    span = VisualSpan(start=2, length=4, grid=(1, 2, 2))
    prompts = [
        [Prompt(1, 12, 9)],
        [Prompt(0, 8, 8), Prompt(8, 12, 11)],
        [],
    ]
    rows = RowMap.of_prompt(12, [11, 12, 0], [[span], [span], []], prompts)
    x = torch.arange(36.0).view(3, 12, 1)
    want = [[[6, 7, 8]], [[18, 19], [20, 21, 22]], []]
    got = [[text.flatten().tolist() for text in row] for row in text_values(x, rows)]
    assert got == want
