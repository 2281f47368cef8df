"""One row per reducer: what the shared matrix must know about it beyond its name.

A reducer without a row is tested at its default options. Give a row to add option sets, or to say
what the method is like: that equal scores must leave the tokens of lowest index, that servers can
run it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencomp import Reduction, VisualTokens, available_reducers, make_reducer
from tokencomp.plan.reducer import only_plans
from tokencomp.reducers.hiprune import MIDDLE
from tokencomp.reducers.selector import INPUTS, SelectorNet
from tokencomp.tokens.signals import TOWER_ATTENTION, TOWER_KEYS, TowerSignal
from tokencomp.tokens.spans import SpanBatch
from tokencomp.trained.cards import model_card, write
from tokencomp.trained.ccam import CCAMProjector, ProjectorConfig

Case = tuple[str, dict[str, Any]]
DIM, QUERIES = 12, 3
_FOLDER = tempfile.TemporaryDirectory()


def small_weights(
    name: str, dim: int, card: dict[str, Any] | None = None, reads: str = "attention"
) -> str:
    """A file of small random weights of a trained reducer, for features of width `dim`."""
    torch.manual_seed(0)
    path = Path(_FOLDER.name) / f"{name}-{len(list(Path(_FOLDER.name).iterdir()))}.safetensors"
    if name == "ccam":
        config = ProjectorConfig(QUERIES, width=8, heads=2, mlp=8, kv_dim=dim, out_dim=dim)
        return str(CCAMProjector(config).save(path, card))
    net = SelectorNet((4, 4), dim if reads == "features" else 0)
    own = {"hidden_size": dim, **(card or {}), "channels": net.channels, "input": INPUTS[reads]}
    return str(write(path, net.state_dict(), own))


@dataclass(frozen=True)
class Row:
    """Options sets to test, and what the method is like.

    `ties`: of the equal tokens of an image the lowest indices stay (what other methods do is in
    `test_merge.py`). `blind`: it looks at places only. `fixed`: it always leaves this many patches.
    `served`: engines can run it with its default options.
    """

    options: tuple[dict[str, Any], ...] = ({},)
    ties: bool = False
    blind: bool = False
    fixed: int | None = None
    served: bool = False

    def keep(self, wanted: int, given: VisualTokens) -> int:
        """The count to ask for where any method could leave `wanted` of `given`."""
        return wanted if self.fixed is None else self.fixed + int(given.special.sum())


ROWS = {
    "adsc": Row(blind=True),
    "ccam": Row(({"weights": small_weights("ccam", DIM)},), fixed=QUERIES),
    "cdpruner": Row(({}, {"relevance": "attention"}), ties=True),
    "anchorprune": Row(ties=True),
    "auto": Row(ties=True),
    "condiv": Row(
        (
            {},
            {"power": 0.35},
            {"power": 0.0},
        ),
        ties=True,
    ),
    "dart": Row(ties=True),
    "divprune": Row(ties=True, served=True),
    "dycoke": Row(served=True),
    "evs": Row(served=True),
    "fastvid": Row(({"least": 2},), ties=True),
    "flashvid": Row(({"least": 2},), ties=True),
    "fusion": Row(served=True),
    "hiprune": Row(ties=True),
    "holitom": Row(ties=True),
    "kcenter": Row(served=True),
    "mmtok": Row(({}, {"cover": "picture"}), ties=True),
    "bipartite": Row(({}, {"weighted": False}), served=True),
    "pool": Row(({}, {"stride": 1.0}), served=True),
    "prune": Row(({}, {"score": "last_query", "schedule": "pyramid"}), ties=True),
    "random": Row(({}, {"seed": 7}, {"at": 0.5}), blind=True, served=True),
    "runlength": Row(served=True),
    "scope": Row(({}, {"saliency": "none"}), ties=True),
    "selector": Row(
        (
            {"weights": small_weights("selector", DIM)},
            {"weights": small_weights("selector", DIM), "pick": "mmr"},
            {"weights": small_weights("selector", DIM, reads="features"), "input": "features"},
        )
    ),
    "uniform": Row(blind=True, served=True),
    "vcast": Row(ties=True, served=True),
    "vidcom2": Row(ties=True, served=True),
    "visionzip": Row(ties=True),
}

COMPOSITIONS = [
    ("bipartite+prune", {}),
    ("condiv+fastv", {"share": 0.7, "condiv.power": 1.0}),
    ("pool+adsc", {}),
    ("divprune+random", {"at": 0.7}),
]
TOWER = (TOWER_ATTENTION, TOWER_KEYS, MIDDLE)
GRIDS = [(1, 1, 1), (1, 3, 5), (1, 8, 8), (4, 2, 4), (5, 3, 3), (9, 1, 1), (2, 1, 7)]
RATIOS = [0.05 * i for i in range(20)]


def cases() -> list[Case]:
    """(name, options) of every row of every registered reducer."""
    found = [(name, o) for name in available_reducers() for o in row(name).options]
    return [*found, *COMPOSITIONS]


def row(name: str) -> Row:
    return ROWS.get(name, Row())


def case_id(case: Case) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items() if k != "weights")])


def on_model(case: Case, model: Any) -> Case:
    """The case with small weights for `model`, if it is a trained reducer."""
    if "weights" not in case[1]:
        return case
    card = model_card(model)
    reads = case[1].get("input", "attention")
    weights = small_weights(case[0], card["hidden_size"], card, reads)
    return case[0], {**case[1], "weights": weights}


def reduce(case: Case, given: VisualTokens, keep: int) -> Reduction:
    """One step of the case's reducer."""
    return make_reducer(case[0], **case[1]).reduce(given, keep)


def step_cases() -> list[Case]:
    """The cases that have a step of their own; presets only make plans."""
    return [(n, o) for n, o in cases() if not only_plans(make_reducer(n, **o))]


def tokens(
    grid: tuple[int, int, int], special: int = 0, dim: int = DIM, seed: int = 0
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
        query_scores=torch.rand(5, generator=g),
        norm=weighted_channels,
        tower={signal: signal_of(signal, n, g) for signal in TOWER},
        modality="video" if grid[0] > 1 else "image",
    )


def weighted_channels(x: Tensor) -> Tensor:
    """Stands for a final norm, whose weights change directions."""
    return x * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)


def signal_of(signal: TowerSignal, n: int, g: torch.Generator) -> Tensor:
    """Random values of a signal of the vision tower: attention, or keys of two heads."""
    attention = signal.part == "attention"
    return torch.rand(n, generator=g) if attention else torch.randn(n, 2, 3, generator=g)


def joined(spans: list[VisualTokens]) -> SpanBatch:
    """The spans as one batch."""

    def cat(name: str) -> Tensor | None:
        values = [getattr(t, name) for t in spans]
        return None if any(v is None for v in values) else torch.cat(values)

    features, missing = cat("features"), any(t.index is not None for t in spans)
    assert features is not None
    return SpanBatch(
        features=features,
        lengths=[len(t) for t in spans],
        grids=[t.grid for t in spans],
        modalities=[t.modality for t in spans],
        fixed=[int(t.special.sum()) for t in spans],
        special=cat("special"),
        index=torch.cat([t.offsets for t in spans]) if missing else None,
        scores=cat("scores"),
        sizes=cat("sizes"),
        tower={s: torch.cat([t.tower[s] for t in spans]) for s in spans[0].tower},
        queries=[t.query for t in spans],
        query_scores=[t.query_scores for t in spans if t.query_scores is not None] or None,
        norm=spans[0].norm,
    )
