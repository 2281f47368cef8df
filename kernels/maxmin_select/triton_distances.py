"""Triton kernels that compute distances: of all pairs of rows, and from the rows just chosen."""

from typing import NamedTuple

import triton
import triton.language as tl
from tokencomp.kernels.maxmin_select import Cosine, RootMeanSquare, isolated_row
from tokencomp.kernels.maxmin_select.rounds import EPSILON
from torch import Tensor

from tokencomp.kernels.tile import long_dot

# Rows and columns of a tile of root mean squares.
DIFFERENCE_BLOCK = 32


@triton.jit
def pitch(rows):
    """Distance in memory between rows of distances: a multiple of 16, so that loads can be wide."""
    return (rows + 15) // 16 * 16


@triton.jit
def gram_kernel(
    x, inverse, first_row, first_gram, gram, stride,
    LEAST: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute one BLOCK × BLOCK tile of the distances 1 - cos of one span.

    The grid is (spans, tiles, tiles) for the longest span. Programs outside of a shorter span end
    at once.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    # All tiles, not half of them: the steps read complete rows of the symmetric matrix.
    if (tl.program_id(1) * BLOCK < rows) & (tl.program_id(2) * BLOCK < rows):
        x += start.to(tl.int64) * stride
        left_rows = x + i.to(tl.int64) * stride
        right_rows = x + j.to(tl.int64) * stride
        dots = tl.zeros([BLOCK, BLOCK], tl.float32)
        dots = long_dot(left_rows, i < rows, right_rows, j < rows, dots, DIM, BLOCK_D)
        left = tl.load(inverse + start + i, mask=i < rows, other=0.0)
        right = tl.load(inverse + start + j, mask=j < rows, other=0.0)
        place = i.to(tl.int64)[:, None] * pitch(rows) + j[None, :]
        mask = (i < rows)[:, None] & (j < rows)[None, :]
        cosine = dots * left[:, None] * right[None, :]
        begin = tl.load(first_gram + span) // 16 * 16
        tl.store(gram + begin + place, tl.maximum(1.0 - cosine, LEAST), mask=mask)


@triton.jit
def mean_square(columns, left, left_inside, right, right_inside, rows, dim, zeros):
    """Mean squares of the differences of rows `left` and rows `right`; `zeros` has their shape.

    `columns` is ``(D, rows)``: the rows of a tile lie side by side, one feature after the other.
    """
    total = zeros
    # One feature of BLOCK rows per load, side by side; the squared difference has no cancellation.
    for _ in range(dim):
        a = tl.load(columns + left, mask=left_inside, other=0.0)
        b = tl.load(columns + right, mask=right_inside, other=0.0)
        difference = a[:, None] - b[None, :]
        total += difference * difference
        columns += rows
    return total / dim


@triton.jit
def difference_kernel(
    columns, first_row, first_gram, gram, total_rows, dim, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute one BLOCK × BLOCK tile of the root mean squares of differences of one span.

    The grid is that of :func:`gram_kernel`; `columns` is fp32 ``(D, rows of all spans)``.
    """
    span = tl.program_id(0)
    start = tl.load(first_row + span)
    rows = tl.load(first_row + span + 1) - start
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(1) * BLOCK < rows) & (tl.program_id(2) * BLOCK < rows):
        zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
        square = mean_square(
            columns, start + i, i < rows, start + j, j < rows, total_rows, dim, zeros
        )
        place = i.to(tl.int64)[:, None] * pitch(rows) + j[None, :]
        mask = (i < rows)[:, None] & (j < rows)[None, :]
        begin = tl.load(first_gram + span) // 16 * 16
        tl.store(gram + begin + place, tl.maximum(tl.sqrt(square), LEAST), mask=mask)


@triton.jit(do_not_specialize=["count"])
def closest_kernel(
    x, inverse, picks, nearest, count, rows, stride,
    LEAST: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lower `nearest` of BLOCK rows to their distance from the closest of the rows `picks`.

    The grid is (blocks of rows,). `count` picks are compared BLOCK at a time. It differs from call
    to call, so it is not specialised, as each new value would compile the kernel again.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(inverse + i, mask=i < rows, other=0.0)
    left_rows = x + i.to(tl.int64) * stride
    closest = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, count, BLOCK):
        p = first + tl.arange(0, BLOCK)
        j = tl.load(picks + p, mask=p < count, other=0)
        right = tl.load(inverse + j, mask=p < count, other=0.0)
        dots = tl.zeros([BLOCK, BLOCK], tl.float32)
        dots = long_dot(left_rows, i < rows, x + j * stride, p < count, dots, DIM, BLOCK_D)
        cosine = dots * left[:, None] * right[None, :]
        # Places after the last pick have cosine 0, which would be the closest of opposite rows.
        cosine = tl.where((p < count)[None, :], cosine, -float("inf"))
        closest = tl.maximum(closest, tl.max(cosine, axis=1))
    # Minima of all rounds accumulate in memory: each pick is compared with all rows once.
    before = tl.load(nearest + i, mask=i < rows, other=0.0)
    distance = tl.maximum(1.0 - closest, LEAST)
    tl.store(nearest + i, tl.minimum(before, distance), mask=i < rows)


@triton.jit(do_not_specialize=["count"])
def closest_difference_kernel(
    columns, picks, nearest, count, rows, dim, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    """:func:`closest_kernel` for root mean squares of differences; `columns` is fp32 ``(D, rows)``.

    The grid is (blocks of rows,).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    closest = tl.full([BLOCK], float("inf"), tl.float32)
    for first in range(0, count, BLOCK):
        p = first + tl.arange(0, BLOCK)
        j = tl.load(picks + p, mask=p < count, other=0)
        zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
        square = mean_square(columns, i, i < rows, j, p < count, rows, dim, zeros)
        # Squares are compared, and one root is taken at the end: it does not change the order.
        square = tl.where((p < count)[None, :], square, float("inf"))
        closest = tl.minimum(closest, tl.min(square, axis=1))
    before = tl.load(nearest + i, mask=i < rows, other=0.0)
    distance = tl.maximum(tl.sqrt(closest), LEAST)
    tl.store(nearest + i, tl.minimum(before, distance), mask=i < rows)


class Cosines(NamedTuple):
    """Rows that are compared by the cosine: `x` ``(n, D)``, and the inverse of their norms."""

    x: Tensor
    inverse: Tensor

    def pairs(self, first_row: Tensor, first_gram: Tensor, gram: Tensor, longest: int) -> None:
        """Write the distances of all pairs of rows of the spans at `first_row` to `gram`."""
        block, block_d, warps = gram_blocks(longest, self.x.element_size())
        tiles = triton.cdiv(longest, block)
        gram_kernel[(len(first_row) - 1, tiles, tiles)](
            self.x, self.inverse, first_row, first_gram, gram, self.x.stride(0), LEAST=EPSILON,
            DIM=self.x.shape[1], BLOCK=block, BLOCK_D=block_d, num_warps=warps, num_stages=3,
        )  # fmt: skip

    def closest(self, new: Tensor, nearest: Tensor) -> None:
        """Lower `nearest` of every row to its distance from the closest of the rows `new`."""
        x = self.x
        block, block_d, warps = closest_blocks(x.element_size())
        closest_kernel[(triton.cdiv(len(x), block),)](
            x, self.inverse, new, nearest, len(new), len(x), x.stride(0), LEAST=EPSILON,
            DIM=x.shape[1], BLOCK=block, BLOCK_D=block_d, num_warps=warps, num_stages=3,
        )  # fmt: skip

    def isolated(self) -> Tensor:
        """The row whose nearest other row is farthest, ``(1,)``, in blocks of all pairs."""
        unit = (self.x.float() * self.inverse[:, None])[None]
        return isolated_row(unit, Cosine, None)

    def part(self, rows: slice | Tensor) -> "Cosines":
        """Some of the rows."""
        return self._replace(x=self.x[rows], inverse=self.inverse[rows])


class Differences(NamedTuple):
    """Rows that are compared by the root mean square of their differences.

    `columns` is fp32 ``(D, n)``, so that programs read the rows of a tile side by side.
    """

    columns: Tensor

    def pairs(self, first_row: Tensor, first_gram: Tensor, gram: Tensor, longest: int) -> None:
        """See :meth:`Cosines.pairs`."""
        dim, total = self.columns.shape
        tiles = triton.cdiv(longest, DIFFERENCE_BLOCK)
        difference_kernel[(len(first_row) - 1, tiles, tiles)](
            self.columns, first_row, first_gram, gram, total, dim,
            LEAST=EPSILON, BLOCK=DIFFERENCE_BLOCK, num_warps=4,
        )  # fmt: skip

    def closest(self, new: Tensor, nearest: Tensor) -> None:
        """See :meth:`Cosines.closest`."""
        dim, total = self.columns.shape
        closest_difference_kernel[(triton.cdiv(total, DIFFERENCE_BLOCK),)](
            self.columns, new, nearest, len(new), total, dim,
            LEAST=EPSILON, BLOCK=DIFFERENCE_BLOCK, num_warps=4,
        )  # fmt: skip

    def isolated(self) -> Tensor:
        """See :meth:`Cosines.isolated`."""
        rows = RootMeanSquare.prepare(self.columns.T[None])
        return isolated_row(rows, RootMeanSquare, None)

    def part(self, rows: slice | Tensor) -> "Differences":
        """Some of the rows."""
        return self._replace(columns=self.columns[:, rows].contiguous())


Rows = Cosines | Differences


def gram_blocks(rows: int, itemsize: int) -> tuple[int, int, int]:
    """Return (rows, features, warps) of a tile of cosines.

    Short spans take smaller tiles, so that there are enough of them to fill the GPU.
    """
    if itemsize == 4:
        return 32, 32, 4
    return (64, 64, 4) if rows <= 1024 else (128, 32, 8)


def closest_blocks(itemsize: int) -> tuple[int, int, int]:
    """Return (rows and choices, features, warps) of a tile.

    A round has few choices but all rows, so the tiles are small.
    """
    return (32, 16, 4) if itemsize == 4 else (64, 64, 4)
