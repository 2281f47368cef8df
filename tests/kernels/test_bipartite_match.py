"""bipartite_match is compared with a loop over rows."""

import math

import pytest
import torch
from support.refused import refused
from tokencomp.kernels import bipartite_match
from torch import Tensor


def by_hand(x: Tensor, lengths: list[int]) -> tuple[list[float], list[int]]:
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
def test_matches_loops(
    place: torch.device, lengths: list[int], dim: int, dtype: torch.dtype
) -> None:
    x = torch.randn(sum(lengths), dim).to(dtype)
    similarity, partner = bipartite_match(x.to(place), lengths)
    want, index = by_hand(x, lengths)
    assert partner.tolist() == index
    # 16-bit products are exact in fp32, so the tolerance is that of fp32 sums.
    assert torch.allclose(similarity.cpu(), torch.tensor(want), atol=1e-5)


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
    shuffled = torch.randn(24, 18, device=place)
    shuffled[:, ::2] = x
    assert torch.equal(bipartite_match(shuffled[:, ::2], 8)[1], want[1])


def test_empty(place: torch.device) -> None:
    similarity, partner = bipartite_match(torch.randn(0, 4, device=place), [])
    assert similarity.shape == partner.shape == (0,)


def test_bad_input(place: torch.device) -> None:
    x, changes = torch.randn(10, 4, device=place), []
    for value in (math.nan, math.inf):
        for row in (2, 3):
            bad = x.clone()
            bad[row, 3] = value
            changes.append(({"x": bad}, "NaN or infinite"))
    changes += [({"frames": frames}, "frames") for frames in (3, 0, [5, 4], [11, -1])]
    changes += [({"x": x[None]}, "must have shape"), ({"x": x.long()}, "must be one of")]
    refused(bipartite_match, {"x": x}, changes)
