"""Ops that move, merge and compare rows, against plain loops."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from tokencomp.kernels import (
    bipartite_match,
    frame_pool,
    gather_rows,
    merge_rows,
    nearest_previous_frame,
)


def by_hand(tensor: Tensor, index: Tensor, seq: int, batch: int) -> Tensor:
    """Copy the rows of one tensor one by one; negative indices leave zeros."""
    shape = list(tensor.shape)
    shape[batch], shape[seq] = index.shape
    out = torch.zeros(shape, dtype=tensor.dtype)
    for b, row in enumerate(index.tolist()):
        source = tensor.select(batch, b if tensor.shape[batch] > 1 else 0)
        target = out.select(batch, b)
        dim = seq - (seq > batch)
        for m, i in enumerate(row):
            if i >= 0:
                target.select(dim, m).copy_(source.select(dim, i))
    return out


def layer(batch: int, rows: int, dtype: torch.dtype) -> tuple[list[Tensor], list[int], list[int]]:
    """Return all tensors of a decoder layer with a sequence axis, and some unusual layouts."""
    tensors = [
        torch.randn(batch, rows, 70).to(dtype),  # hidden states
        torch.randn(batch, rows, 16).to(dtype),  # cos
        torch.randn(1, rows, 16),  # sin, shared by the batch, another dtype
        torch.randn(3, batch, rows, 16).to(dtype),  # M-RoPE cos
        torch.rand(batch, rows) > 0.5,  # mask
        torch.arange(3 * batch * rows).view(3, batch, rows),  # M-RoPE positions
        torch.randn(batch, 2, rows, 24).to(dtype),  # keys
        torch.randn(batch, rows, 2, 24).to(dtype).transpose(1, 2),  # values, strided
        torch.randn(2, batch, 3, rows, 8).to(dtype),  # several layers in one tensor
        torch.randn(rows, batch, 1300).to(dtype),  # sequence first
        torch.randint(0, 99, (batch, rows, 3, 5), dtype=torch.int32),
    ]
    return tensors, [1, 1, 1, 2, 1, 2, 2, 2, 3, 0, 1], [0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("batch", "rows", "out_rows", "dtype"),
    [(1, 50, 20, torch.float32), (3, 37, 41, torch.bfloat16)],
)
def test_matches_copies(
    place: torch.device, batch: int, rows: int, out_rows: int, dtype: torch.dtype
) -> None:
    tensors, seq, batches = layer(batch, rows, dtype)
    index = torch.randint(-rows // 3 - 1, rows, (batch, out_rows))
    index = index.int() if batch > 1 else index
    got = gather_rows([t.to(place) for t in tensors], index.to(place), seq, batches)
    for tensor, out, s, b in zip(tensors, got, seq, batches, strict=True):
        assert out.is_contiguous() and out.dtype == tensor.dtype
        assert torch.equal(out.cpu(), by_hand(tensor, index, s, b))


@pytest.mark.parametrize("batch", [1, 2])
def test_tensors_without_rows_give_padding(place: torch.device, batch: int) -> None:
    """Their only valid index is -1; tensors with rows are gathered in the same call."""
    tensors, seq, batches = layer(batch, 0, torch.float32)
    tensors, seq, batches = [*tensors, torch.randn(batch, 3, 8)], [*seq, 1], [*batches, 0]
    index = torch.full((batch, 2), -1)
    got = gather_rows([t.to(place) for t in tensors], index.to(place), seq, batches)
    for tensor, out, s, b in zip(tensors, got, seq, batches, strict=True):
        assert out.dtype == tensor.dtype
        assert torch.equal(out.cpu(), by_hand(tensor, index, s, b))


def random_merge(lengths: list[int], kept: float = 0.4) -> tuple[Tensor, Tensor]:
    """Draw kept rows and targets within every segment; a tenth of the other rows is dropped."""
    target, keep, start = [], [], 0
    for length in lengths:
        chosen = (torch.rand(length) < kept).nonzero().squeeze(1)
        if length and len(chosen) == 0:
            chosen = torch.tensor([length - 1])
        into = chosen[torch.randint(max(1, len(chosen)), (length,))] if length else chosen.clone()
        into[torch.rand(length) < 0.1] = -1 - start
        into[chosen] = chosen
        target.append(into + start)
        keep.append(chosen + start)
        start += length
    return torch.cat(target), torch.cat(keep)


def by_hand_merge_rows(
    x: Tensor, target: Tensor, keep: Tensor, sizes: Tensor, weighted: bool
) -> tuple[Tensor, Tensor]:
    x = x.double()
    merged, total = [], []
    for row in keep.tolist():
        members = [i for i, into in enumerate(target.tolist()) if into == row]
        weight = sizes[members].double() if weighted else torch.ones(len(members)).double()
        merged.append((x[members] * weight[:, None]).sum(0) / weight.sum())
        total.append(sizes[members].sum())
    return torch.stack(merged), torch.stack(total)


@pytest.mark.parametrize(
    ("lengths", "dim", "weighted", "dtype"),
    [
        ([6, 0, 33, 1], 70, True, torch.float32),
        ([6, 0, 33, 1], 70, False, torch.float32),
        ([100, 100], 130, True, torch.bfloat16),
    ],
    ids=str,
)
def test_matches_loops(
    place: torch.device, lengths: list[int], dim: int, weighted: bool, dtype: torch.dtype
) -> None:
    rows = sum(lengths)
    x = torch.randn(rows, dim).to(dtype)
    target, keep = random_merge(lengths)
    sizes = torch.randint(1, 5, (rows,)).float()
    want = by_hand_merge_rows(x, target, keep, sizes, weighted)
    for frames in (lengths, None):
        got = merge_rows(
            x.to(place), target.to(place), keep.to(place), sizes.to(place), frames=frames,
            weighted=weighted,
        )  # fmt: skip
        assert got.x.dtype == dtype
        # The result is rounded once to the output dtype, and the interpreter truncates instead.
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        assert torch.allclose(got.x.cpu().double(), want[0], rtol=tolerance, atol=1e-5)
        assert torch.allclose(got.sizes.cpu(), want[1])


def test_defaults(place: torch.device) -> None:
    x = torch.randn(4, 8)
    target, keep = torch.tensor([1, 1, 3, 3]), torch.tensor([1, 3])
    got = merge_rows(x.to(place), target.to(place), keep.to(place))
    assert got.sizes.tolist() == [2.0, 2.0]
    assert torch.allclose(got.x.cpu(), (x[::2] + x[1::2]) / 2, atol=1e-6)


def test_long_segments_are_sorted_not_scanned(
    place: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In segments above ``MAX_SCAN`` rows the kernel takes members from a sorted list."""
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("tokencomp.kernels.merge_rows.triton")
        monkeypatch.setattr(triton, "MAX_SCAN", 100)
    target, keep = random_merge([500], 0.05)
    x, sizes = torch.randn(500, 16), torch.rand(500) + 0.5
    want = by_hand_merge_rows(x, target, keep, sizes, True)
    got = merge_rows(x.to(place), target.to(place), keep.to(place), sizes.to(place))
    assert torch.allclose(got.x.cpu().double(), want[0], atol=1e-5)
    assert torch.allclose(got.sizes.cpu(), want[1])


def test_rows_without_members_are_copied_bit_for_bit(place: torch.device) -> None:
    x = torch.randn(50, 40).bfloat16()
    index = torch.arange(50, device=place)
    got = merge_rows(x.to(place), index, index, frames=25)
    assert torch.equal(got.x.cpu(), x)


def test_nan_stays_in_its_own_row(place: torch.device) -> None:
    x = torch.randn(4, 3)
    x[0, 1] = math.nan
    target, keep = torch.tensor([1, 1, 3, 3]), torch.tensor([1, 3])
    got = merge_rows(x.to(place), target.to(place), keep.to(place)).x
    assert got.isnan().sum() == 1 and got[0, 1].isnan()


def area(frame: Tensor, h: int, w: int) -> Tensor:
    """Mean over the input cells of every output cell."""
    height, width, _ = frame.shape
    cells = []
    for i in range(h):
        for j in range(w):
            rows = range(i * height // h, math.ceil((i + 1) * height / h))
            columns = range(j * width // w, math.ceil((j + 1) * width / w))
            cells.append(torch.stack([frame[y, x] for y in rows for x in columns]).mean(0))
    return torch.stack(cells)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "grids"),
    [
        ((4, 7, 5, 70), [(4, 3), (7, 5), (1, 1), (3, 5)]),
        ((2, 14, 14, 130), [(14, 14), (6, 5)]),
        ((2, 3, 3, 1100), [(2, 2), (3, 1)]),
    ],
    ids=str,
)
def test_matches_loops_frame_pool(
    place: torch.device,
    shape: tuple[int, ...],
    grids: list[tuple[int, int]],
    dtype: torch.dtype,
) -> None:
    x = torch.randn(shape).to(dtype)
    want = torch.cat([area(f.double(), *grid) for f, grid in zip(x, grids, strict=True)])
    got = frame_pool(x.to(place), grids)
    assert got.dtype == dtype
    # The result is rounded once to the output dtype, and the interpreter truncates instead.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(got.cpu().double(), want, rtol=tolerance, atol=1e-5)


def test_full_grid_returns_the_frame_bit_for_bit(place: torch.device) -> None:
    x = torch.randn(2, 5, 3, 40).bfloat16()
    assert torch.equal(frame_pool(x.to(place), [(5, 3)] * 2).cpu(), x.flatten(0, 2))


def by_hand_nearest_previous_frame(x: Tensor) -> Tensor:
    """Compare every token with its place in the previous frame in plain loops."""
    frames, height, width, _ = x.shape
    x = x.double()
    similarity = torch.full(x.shape[:3], -math.inf)
    for t in range(1, frames):
        for y in range(height):
            for column in range(width):
                a, b = x[t, y, column], x[t - 1, y, column]
                norm = a.norm() * b.norm()
                similarity[t, y, column] = a @ b / norm if norm else 0.0
    return similarity


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 3, 3, 8), torch.float32),
        ((3, 5, 4, 70), torch.bfloat16),
        ((2, 2, 2, 1100), torch.float32),
    ],
    ids=str,
)
def test_matches_loops_nearest_previous_frame(
    place: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    similarity = nearest_previous_frame(x.to(place))
    assert torch.allclose(similarity.cpu(), by_hand_nearest_previous_frame(x), atol=1e-5)


def by_hand_bipartite_match(x: Tensor, lengths: list[int]) -> tuple[list[float], list[int]]:
    """Compare every even row of a frame with every odd row of the frame in plain loops."""
    rows = x.double().tolist()
    similarity, partner = [-math.inf] * len(rows), [-1] * len(rows)
    start = 0
    for length in lengths:
        for a in range(start, start + length, 2):
            for b in range(start + 1, start + length, 2):
                norm = math.hypot(*rows[a]) * math.hypot(*rows[b])
                dot = sum(p * q for p, q in zip(rows[a], rows[b], strict=True))
                cosine = dot / norm if norm else 0.0
                if cosine > similarity[a]:
                    similarity[a], partner[a] = cosine, b
        start += length
    return similarity, partner


@pytest.mark.parametrize(
    ("lengths", "dim", "dtype"),
    [
        ([7, 7, 7], 33, torch.float32),
        ([0, 5, 1, 40, 2], 70, torch.bfloat16),
        ([150, 75], 130, torch.float16),
    ],
    ids=str,
)
def test_matches_loops_bipartite_match(
    place: torch.device, lengths: list[int], dim: int, dtype: torch.dtype
) -> None:
    x = torch.randn(sum(lengths), dim).to(dtype)
    similarity, partner = bipartite_match(x.to(place), lengths)
    want, index = by_hand_bipartite_match(x, lengths)
    assert partner.tolist() == index
    # 16-bit products are exact in fp32, so the tolerance is that of fp32 sums.
    assert torch.allclose(similarity.cpu(), torch.tensor(want), atol=1e-5)


def test_rows_of_an_odd_frame_are_matched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two even rows are in memory at a time, so that the third and last is alone in a block."""
    monkeypatch.setitem(bipartite_match.__globals__, "BLOCK_ELEMENTS", 4)
    monkeypatch.setenv("TOKENCOMP_KERNELS", "naive")
    x = torch.randn(10, 8)
    assert bipartite_match(x, [5, 5])[1].tolist() == by_hand_bipartite_match(x, [5, 5])[1]


def test_equal_partners_go_to_the_lower_row(place: torch.device) -> None:
    """All odd rows are equal, and in the second frame those two that are farthest apart."""
    base = torch.randint(-3, 4, (1, 16)).float()
    x = base.repeat(350, 1)
    x[:200:2] *= torch.randint(1, 5, (100, 1))
    x[203:349:2] = -base
    _, partner = bipartite_match(x.to(place), [200, 150])
    assert partner[:200:2].tolist() == [1] * 100
    assert partner[200::2].tolist() == [201] * 75


def test_zero_rows_have_cosine_zero(place: torch.device) -> None:
    x = torch.zeros(6, 8)
    x[1] = -1.0
    x[0] = 1.0
    similarity, partner = bipartite_match(x.to(place))
    # Row 0 prefers cosine 0 with row 3 over -1 with row 1; zero rows tie everywhere.
    assert partner.tolist() == [3, -1, 1, -1, 1, -1]
    assert similarity[::2].tolist() == [0.0, 0.0, 0.0]


def test_frames_as_number_list_and_tensor_agree(place: torch.device) -> None:
    x = torch.randn(24, 9, device=place)
    want = bipartite_match(x, 8)
    for frames in ([8, 8, 8], torch.tensor([8, 8, 8])):
        got = bipartite_match(x, frames)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
