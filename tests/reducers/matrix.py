"""One row per reducer: what the shared matrix must know about it beyond its name.

A reducer without a row is tested at its default options. Give a row to add option sets, or to say
that equal scores must leave the tokens of lowest index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokencomp import Reducer, VisualTokens, available_reducers, make_reducer


@dataclass(frozen=True)
class Row:
    """Options sets to test, and what the method is like.

    `ties`: of equal tokens the lowest indices stay. `blind`: it looks at places only.
    """

    options: tuple[dict[str, Any], ...] = ({},)
    ties: bool = False
    blind: bool = False


ROWS = {
    "adsc": Row(blind=True),
    "cdpruner": Row(({}, {"relevance": "attention"}, {"relevance": "none"}), ties=True),
    "condiv": Row(
        (
            {},
            {"power": 0.0},
            {"signal": "norm", "centred": True},
            {"signal": "novelty", "power": 1.0},
            {"signal": "none", "merge_rest": 0.5},
        ),
        ties=True,
    ),
    "divprune": Row(ties=True),
    "merge": Row(({}, {"weighted": False}, {"temporal": True}, {"position": "first"})),
    "oracle": Row(()),  # needs the true relevance of its prompt: see the training tests
    "pool": Row(({}, {"group": 3, "stride": 1.5}, {"mode": "bilinear"})),
    "prune": Row(({}, {"score": "last_query", "schedule": "pyramid"}), ties=True),
    "random": Row(({}, {"seed": 7}), blind=True),
    "uniform": Row(blind=True),
}

COMPOSITIONS = [
    ("merge+prune", {}),
    ("condiv+fastv", {"share": 0.7, "condiv.power": 1.0}),
    ("pool+adsc", {"mode": "bilinear"}),
]
GRIDS = [(1, 1, 1), (1, 3, 5), (1, 8, 8), (4, 2, 4), (5, 3, 3), (9, 1, 1), (2, 1, 7)]
RATIOS = [0.05 * i for i in range(20)]


def cases() -> list[tuple[str, dict[str, Any]]]:
    """(name, options) of every row of every registered reducer that needs no trained weights."""
    found = []
    for name, cls in available_reducers().items():
        trained = "weights" in getattr(cls, "__dataclass_fields__", {})
        if name in ROWS or not trained:
            found += [(name, options) for options in ROWS.get(name, Row()).options]
    return [*found, *COMPOSITIONS]


def case_id(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def step_cases() -> list[tuple[str, dict[str, Any]]]:
    """The cases that have a step of their own; presets only make plans."""
    return [(n, o) for n, o in cases() if type(make_reducer(n, **o)).reduce is not Reducer.reduce]


def tokens(
    grid: tuple[int, int, int], special: int = 0, dim: int = 12, seed: int = 0
) -> VisualTokens:
    """Random tokens, `special` of them spread over the span, with scores and a question."""
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] * grid[2] + special
    mask = torch.zeros(n, dtype=torch.bool)
    mask[[(i + 1) * n // special - 1 for i in range(special)]] = True
    return VisualTokens(
        features=torch.randn(n, dim, generator=g),
        grid=grid,
        special=mask,
        scores=torch.rand(n, generator=g),
        query=torch.randn(5, dim, generator=g),
        kind="video" if grid[0] > 1 else "image",
    )
