"""The order in which rows leave, against plain loops."""

from __future__ import annotations

import pytest
import torch

from tokencomp.session.held import NOWHERE, TEXT, Held, PatchPlaces, oldest, redundant
from tokencomp.tokens.tokens import VisualSpan


def random_rows(seed: int, n: int = 60) -> Held:
    """Rows of text and of six items, with many equal appearances."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    items = draw(0, 6).sort().values
    items[draw(0, 5) == 0] = TEXT
    places = torch.where((items == TEXT) | (draw(0, 4) == 0), NOWHERE, draw(0, 9))
    appearance = torch.randn(4, 5, generator=generator)[draw(0, 4)]
    return Held(torch.arange(n) * 2 + 3, items, places, appearance)


def slow_redundant(held: Held) -> list[int]:
    """One row after the other: the most alike patch, and delimiters once their patches are gone."""
    n = len(held)
    patches = [i for i in range(n) if held.items[i] != TEXT and held.places[i] != NOWHERE]

    def score(i: int) -> float:
        newest = max(j for j in patches if held.places[j] == held.places[i])
        if newest == i:
            return -2.0
        return float(
            torch.nn.functional.cosine_similarity(held.appearance[i], held.appearance[newest], 0)
        )

    order: list[int] = []

    def orphans() -> None:
        for i in range(n):
            own = held.items[i]
            if own == TEXT or held.places[i] != NOWHERE or i in order:
                continue
            if all(j in order for j in patches if held.items[j] == own):
                order.append(i)

    orphans()
    for i in sorted(patches, key=lambda i: (-round(score(i), 4), i)):
        order.append(i)
        orphans()
    return order


@pytest.mark.parametrize("seed", range(6))
def test_redundant_rows_go_as_in_plain_loops(seed: int) -> None:
    held = random_rows(seed)
    assert redundant(held).tolist() == slow_redundant(held)


def test_oldest_rows_go_and_text_stays() -> None:
    held = random_rows(1)
    expected = [i for i in range(len(held)) if held.items[i] != TEXT]
    assert oldest(held).tolist() == expected
    assert sorted(redundant(held).tolist()) == expected


def test_what_changed_stays_longest() -> None:
    """Four frames of two places; the second changes once and back again."""
    a, b, c = torch.eye(3)
    appearance = torch.stack([a, b, a, c, a, b, a, b])
    rows = torch.arange(8)
    held = Held(rows, rows // 2, rows % 2, appearance)
    assert redundant(held).tolist() == [0, 1, 2, 4, 5, 3, 6, 7]


def test_features_beside_text_keep_their_dtype() -> None:
    none, features = torch.zeros(2, 0), torch.randn(2, 4).bfloat16()
    text = Held(torch.arange(2), torch.full((2,), TEXT), torch.full((2,), NOWHERE), none)
    media = Held(torch.arange(2), torch.zeros(2, dtype=torch.long), torch.arange(2), features)
    for joined, rows in ((text.joined(media), slice(2, 4)), (media.joined(text), slice(0, 2))):
        assert joined.appearance.dtype == torch.bfloat16
        assert torch.equal(joined.appearance[rows], features)


def test_places() -> None:
    places = PatchPlaces()
    video = VisualSpan(2, 14, (2, 2, 3), "video", text=(6, 7), item=0)
    image = VisualSpan(1, 6, (1, 2, 3), "image", item=0)
    unknown = VisualSpan(0, 4, (1, 1, 4), "image", grid_known=False, item=0)
    first = places.of([video], 17).tolist()
    assert first == [-1, -1, 0, 1, 2, 3, 4, 5, -1, -1, 0, 1, 2, 3, 4, 5, -1]
    assert places.of([image], 7).tolist() == [-1, 6, 7, 8, 9, 10, 11]
    assert places.of([video], 17).tolist() == first
    assert places.of([unknown], 4).tolist() == [-1] * 4
    tiles = [VisualSpan(0, 2, (1, 1, 2), item=5), VisualSpan(2, 2, (1, 1, 2), item=5, tile=1)]
    assert places.of(tiles, 4).tolist() == [12, 13, 14, 15]
    assert places.of(tiles[1:], 4).tolist() == [-1, -1, 14, 15]
    frames = [VisualSpan(0, 2, (1, 1, 2), item=5), VisualSpan(2, 2, (1, 1, 2), item=5)]
    assert places.of(frames, 4).tolist() == [12, 13, 12, 13]
