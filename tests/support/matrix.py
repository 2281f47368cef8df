"""One row per reducer: what the shared matrix must know about it beyond its name.

A reducer without a row is tested at its default options. Give a row to add option sets, or to say
what the method is like: that equal scores must leave the tokens of lowest index, that servers can
run it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencomp import Kept, Reducer, Tokens, available_reducers, make_reducer
from tokencomp.plan.options import only_plans
from tokencomp.reducers.base import reduced
from tokencomp.reducers.hiprune import MIDDLE
from tokencomp.reducers.selector import INPUTS, SelectorNet
from tokencomp.tokens.signals import TOWER_ATTENTION, TOWER_KEYS, TowerSignal
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

    def keep(self, wanted: int) -> int:
        """The budget to ask for where any method could leave `wanted`."""
        return wanted if self.fixed is None else self.fixed


ROWS = {
    "adsc": Row(blind=True),
    "ccam": Row(({"weights": small_weights("ccam", DIM)},), fixed=QUERIES),
    "cdpruner": Row(({}, {"relevance": "attention"}), ties=True),
    "anchorprune": Row(ties=True),
    "auto": Row(ties=True, served=True),
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
    """(name, options) of every row of every registered reducer that keeps as many as asked for."""
    known = [name for name, cls in available_reducers().items() if not cls.traits.decides]
    found = [(name, o) for name in known for o in row(name).options]
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


def kept(reducer: Reducer, given: Tokens, *budgets: int) -> Kept:
    """What a reducer keeps of the spans, with a budget for every one."""
    return reduced(reducer, dataclasses.replace(given, budgets=[*budgets]))


def reduce(case: Case, given: Tokens, *budgets: int) -> Kept:
    """`kept` of the case's reducer."""
    return kept(make_reducer(case[0], **case[1]), given, *budgets)


def step_cases() -> list[Case]:
    """The cases that choose tokens; the others only plan stages of other reducers."""
    return [(n, o) for n, o in cases() if not only_plans(make_reducer(n, **o))]


def tokens(grid: tuple[int, int, int], dim: int = DIM, seed: int = 0) -> Tokens:
    """Random patches of one span, with scores and a question, and a budget of one."""
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] * grid[2]
    return Tokens(
        features=torch.randn(n, dim, generator=g),
        grids=[grid],
        budgets=[1],
        modalities=["video" if grid[0] > 1 else "image"],
        scores=torch.rand(n, generator=g),
        queries=[torch.randn(5, dim, generator=g)],
        query_scores=[torch.rand(5, generator=g)],
        norm=weighted_channels,
        tower={signal: signal_of(signal, n, g) for signal in TOWER},
    )


def weighted_channels(x: Tensor) -> Tensor:
    """Stands for a final norm, whose weights change directions."""
    return x * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)


def signal_of(signal: TowerSignal, n: int, g: torch.Generator) -> Tensor:
    """Random values of a signal of the vision tower: attention, or keys of two heads."""
    attention = signal.part == "attention"
    return torch.rand(n, generator=g) if attention else torch.randn(n, 2, 3, generator=g)


def joined(spans: list[Tokens], *budgets: int) -> Tokens:
    """The spans as one call, by default with the budgets that they have."""

    def cat(name: str) -> Any:
        values = [getattr(t, name) for t in spans]
        if any(v is None for v in values):
            return None
        return torch.cat(values) if isinstance(values[0], Tensor) else list(chain(*values))

    missing = any(t.index is not None for t in spans)
    names = ("features", "grids", "lengths", "modalities", "scores", "weights")
    return Tokens(
        **{name: cat(name) for name in (*names, "queries", "query_scores")},
        budgets=[*budgets] or cat("budgets"),
        index=torch.cat([t.cells() for t in spans]) if missing else None,
        tower={s: torch.cat([t.tower[s] for t in spans]) for s in spans[0].tower},
        norm=spans[0].norm,
    )
