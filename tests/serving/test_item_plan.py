"""The plan of a media item: spans, counts and rows are those of the Hugging Face path."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families
from support.serving.cases import SERVABLE
from support.serving.selectors import selector

import tokencomp
from tokencomp import Reducer
from tokencomp.adapters.registry import adapter_for
from tokencomp.adapters.towers.base import Cells
from tokencomp.errors import OptionError, PlanError, WeightsError
from tokencomp.method import Method
from tokencomp.reducers.registry import available_reducers, make_reducer
from tokencomp.serving import item_plan
from tokencomp.serving.item_plan import ItemPlan, cache_key, config_facts, item_span
from tokencomp.serving.item_rows import reduce_item, reduce_rows
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm.tower import kept_cells
from tokencomp.tokens.tokens import Grid, ModelFacts, Tokens, VisualSpan
from tokencomp.trained.cards import model_card, model_facts

SPANS = [((1, 5, 7), ""), ((3, 4, 4), ""), ((1, 6, 5), "rows"), ((4, 3, 3), "end"), ((1, 1, 1), "")]


def special_by_loops(grid: Grid, special: str) -> list[bool]:
    """Which tokens carry no patch: one after each of the rows, or one at the end."""
    t, h, w = grid
    if special == "rows":
        return [flag for _ in range(h) for flag in [*[False] * w, True]]
    return [False] * (t * h * w) + [True] * (special == "end")


def span_of(kind: str, grid: Grid, special: str = "") -> VisualSpan:
    marks = special_by_loops(grid, special)
    return item_span(kind, grid, [place for place, mark in enumerate(marks) if mark])


def spans_of(kind: str) -> list[VisualSpan]:
    return [span_of(kind, *span) for span in SPANS]


@pytest.mark.parametrize("name", SERVABLE)
def test_each_kind_of_media_has_its_ratio(name: str) -> None:
    spec = Method(name, {"image": 0.9, "video": 0.4})
    for kind, ratio in (("image", 0.9), ("video", 0.4)):
        alone = ItemPlan.make(spans_of(kind), Method(name, ratio))
        assert ItemPlan.make(spans_of(kind), spec) == alone
        assert alone.modality == kind
    whole = ItemPlan.make(spans_of("image"), Method(name, {"video": 0.4}))
    assert whole.keep == tuple(len(special_by_loops(*span)) for span in SPANS)
    x = torch.randn(whole.full, 16)
    assert torch.equal(reduce_item(whole, x)[0], x)


def kept_of(
    reducer: Reducer, x: torch.Tensor, grid: Grid, special: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and features of what is kept of a span, by loops over its special tokens."""
    patches = [i for i in range(len(x)) if not special[i]]
    budget = keep - (len(x) - len(patches))
    done = reducer.reduce(Tokens(x[patches], [grid], [budget], modalities=["video"]))
    found = {i: x[i] for i in range(len(x)) if special[i]}
    for number, row in enumerate(done.patches.tolist()):
        at = patches[row]
        found[at] = x[at] if done.features is None else done.features[number]
    return torch.tensor(sorted(found)), torch.stack([found[i] for i in sorted(found)])


@pytest.mark.parametrize("name", SERVABLE)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.95])
def test_both_backends_count_and_reduce_alike(name: str, ratio: float) -> None:
    """The count is the one the Hugging Face path plans; rows are its reducer's, span by span."""
    reducer = make_reducer(name).bind(ModelFacts(mrope=False))
    stages = reducer.plan(ratio, 4).stages
    assert [s.layer for s in stages] == [0]
    plan = ItemPlan.make(spans_of("video"), Method(reducer, ratio))
    x = torch.randn(plan.full, 16, generator=torch.Generator().manual_seed(1))
    rows, index = reduce_item(plan, x)
    start = at = 0
    for (grid, marked), keep in zip(SPANS, plan.keep, strict=True):
        special = torch.tensor(special_by_loops(grid, marked))
        length, marks = len(special), tuple(special.nonzero()[:, 0].tolist())
        span = VisualSpan(0, length, grid, "video", marks)
        assert reducer.plan(ratio, 4).counts(span, 4) == [keep]
        part = x[start : start + length]
        if keep < length:
            places, merged = kept_of(reducer, part, grid, special, keep)
            assert torch.equal(rows[at : at + keep], merged)
            assert torch.equal(index[at : at + keep], places + start)
        else:
            assert torch.equal(rows[at : at + keep], part)
        start, at = start + length, at + keep
    assert at == plan.kept == len(rows) == len(index)


@pytest.mark.parametrize("budget", [7, 13, 30, 500])
def test_spans_and_budgets_are_those_of_the_patched_model(budget: int) -> None:
    """The tiles of an image share its budget."""
    family = families.FAMILIES["llava_onevision"]
    model, spec = family.build(), Method("uniform", budget=budget)
    with tokencomp.patch(model, reducer="uniform", budget=budget) as handle:
        model(**family.batch([[family.image(1), [5], family.video(4)]]))
        counts = [left for (left,) in handle.stats.counts[0]]
        spans = [dataclasses.replace(span, start=0) for span in handle.stats.spans[0]]
    tiles = [span_of("image", (1, 4, 4)), span_of("image", (1, 4, 8), "rows")]
    clip = [span_of("video", (4, 2, 2), "end")]
    assert spans == tiles + clip
    image, video = ItemPlan.make(tiles, spec), ItemPlan.make(clip, spec)
    assert [*image.keep, *video.keep] == counts
    assert video.kept == min(budget, 17) and image.kept == min(budget, 52)


def test_plans_travel_unchanged() -> None:
    plan = ItemPlan.make(spans_of("image"), Method(make_reducer("random", seed=3), 0.4))
    data = plan.to_tensor()
    assert data.dtype == torch.uint8 and ItemPlan.from_tensor(data) == plan
    with pytest.raises(RuntimeError, match="planned"):
        reduce_item(plan, torch.zeros(plan.full + 1, 4))


@pytest.mark.parametrize(
    ("name", "amount"),
    [
        ("uniform", {"ratio": 0.75, "tower_ratio": 0.5}),
        ("divprune", {"budget": 15, "tower_ratio": "auto"}),
        ("bipartite", {"ratio": 0.75, "tower_ratio": 0.5}),
    ],
)
def test_behind_a_tower_stage_the_entry_sees_what_the_tower_left(name: str, amount: Any) -> None:
    """Rows that the tower dropped are NaN; counts and rows are those of the stages' reducers."""
    grid, cells = (2, 5, 6), 24 if "budget" in amount else 30
    spec = Method(name, **amount, tower_reducer="random")
    plan = ItemPlan.make([item_span("video", grid)], spec, 6)
    assert ItemPlan.from_tensor(plan.to_tensor()) == plan
    assert (plan.entering, plan.kept) == (cells, 15)
    present = torch.randperm(60, generator=torch.Generator().manual_seed(2))[:cells].sort().values
    x = torch.full((60, 8), torch.nan)
    x[present] = torch.randn(cells, 8)
    done = make_reducer(name).reduce(Tokens(x[present], [grid], [15], [cells], ["video"], present))
    rows, index = reduce_rows(plan, x, 8, lambda *_: pytest.fail("rows are finite"), present)
    assert torch.equal(index, present[done.patches])
    assert torch.equal(rows, x[index] if done.features is None else done.features)
    reports = []
    x[present[3], 1] = torch.inf  # a feature that the tower has computed
    rows, index = reduce_rows(plan, x, 8, lambda *report: reports.append(report), present)
    assert len(reports) == 1 and torch.isfinite(rows).all()
    assert set(index.tolist()) <= set(present.tolist())


def test_a_tower_stage_that_leaves_what_the_ratio_asks_for_is_the_only_one() -> None:
    spec = Method("uniform", 0.5, tower_ratio=0.5)
    plan = ItemPlan.make([item_span("image", (1, 4, 5))], spec)
    assert plan.entering == plan.kept == 10
    present = torch.arange(0, 20, 2)
    x = torch.randn(20, 3)
    rows, index = reduce_item(plan, x, present)
    assert torch.equal(index, present) and torch.equal(rows, x[::2])


def test_trained_weights_are_checked_where_items_are_planned_and_read_once(tmp_path: Path) -> None:
    """A front end has no weights of the model, only its config; a worker has a plan as bytes."""
    model = families.FAMILIES["qwen2_vl"].build()
    facts = config_facts(model.config, "")
    known = model_facts(adapter_for(model))
    for name in ("model_type", "num_layers", "hidden_size"):
        assert getattr(facts, name) == getattr(known, name)
    options, file = selector(tmp_path, model_card(model)), tmp_path / "selector.safetensors"
    asked = {"reducer": "selector", "ratio": 0.5, "options": options}
    spec = ServerOptions.parse(asked, "vllm").default
    plan = ItemPlan.make([span_of("video", (4, 3, 3), "end")], spec, 5, facts)
    x = torch.randn(37, facts.hidden_size, generator=torch.Generator().manual_seed(3))
    reducer = make_reducer("selector", **options | {"weights": str(file)})
    want, _ = kept_of(reducer, x, (4, 3, 3), torch.arange(37) == 36, plan.kept)
    sent = ItemPlan.from_tensor(plan.to_tensor())
    assert reduce_item(sent, x)[1].tolist() == want.tolist()
    file.unlink()  # an engine ends with the first exception of a worker
    assert reduce_item(sent, x)[1].tolist() == want.tolist()
    for wrong in (facts, None, dataclasses.replace(facts, hidden_size=9)):
        with pytest.raises(WeightsError):
            ItemPlan.make([item_span("image", (1, 3, 3))], spec, 5, wrong)
    with pytest.raises(OptionError, match="selector with input=features"):
        ServerOptions.parse({**asked, "options": {"weights": str(tmp_path)}}, "vllm")


def test_weights_that_are_trained_again_have_other_keys_and_choose_anew(tmp_path: Path) -> None:
    """The path stays the same; what lies there is what caches and workers must tell apart."""
    card = {"model_type": "any", "num_layers": 2, "hidden_size": 8}
    facts, span, x = ModelFacts(False, **card), item_span("image", (1, 6, 6)), torch.randn(36, 8)
    keys, kept = [], []
    for sign in (1, 1, -1):  # the second training finds what the first found
        options = selector(tmp_path, card, sign, time=len(keys))
        asked = {"reducer": "selector", "ratio": 0.75, "options": options}
        spec = ServerOptions.parse(asked, "vllm").default
        keys.append(cache_key(spec, facts))
        plan = ItemPlan.make([span], spec, 0, facts)
        kept.append(reduce_item(ItemPlan.from_tensor(plan.to_tensor()), x)[1].tolist())
        file = str(tmp_path / "selector.safetensors")
        reducer = make_reducer("selector", **options | {"weights": file})
        assert kept[-1] == reducer.reduce(Tokens(x, [span.grid], [plan.kept])).patches.tolist()
    assert keys[0] == keys[1] != keys[2]
    assert kept[0] == kept[1] != kept[2]


def test_releases_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles with different releases of tokencomp do not find each other's work."""
    spec = Method("kcenter", 0.5)
    key = cache_key(spec)
    assert key == cache_key(Method("kcenter", 0.5))
    monkeypatch.setattr(item_plan, "__version__", "another")
    assert key != cache_key(spec)


@pytest.mark.parametrize(("extent", "position"), [(0, "first"), (40, "mean")])
def test_pooled_tokens_have_the_positions_of_the_patched_model(extent: int, position: str) -> None:
    """Between line breaks, the place of a pooled token decides the order of the rows."""
    grid, mask = (1, 6, 5), torch.tensor(special_by_loops((1, 6, 5), "rows"))
    spec = Method(make_reducer("pool"), 0.5)
    plan = ItemPlan.make([span_of("image", grid, "rows")], spec, extent)
    x = torch.randn(len(mask), 8)
    rows, kept = reduce_item(plan, x)
    other = make_reducer("pool", position="mean" if extent == 0 else "first")
    assert not torch.equal(kept_of(other, x, grid, mask, plan.keep[0])[1], rows)
    places, merged = kept_of(make_reducer("pool", position=position), x, grid, mask, plan.keep[0])
    assert torch.equal(kept, places) and torch.equal(rows, merged)


PIXELS = {"noise": 1.0, "equal": 0.0, "overflow": 1e30}


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("scale", PIXELS)
def test_no_pixels_make_the_stage_in_the_tower_fail(scale: str, kind: str) -> None:
    """An engine ends with the first exception, so every reducer that a request may name works."""
    grid, seen = (1 if kind == "image" else 4, 3, 5), []
    n = grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4 * n, 3, 2, 2, generator=generator) * PIXELS[scale]
    cells = Cells(pixels, torch.arange(4 * n).view(n, 4), [[grid]], kind)
    for name in available_reducers():
        options = {"ratio": 0.75, "tower_ratio": 0.6, "tower_reducer": name}
        try:
            spec = ServerOptions().resolve(options, "vllm")
        except (OptionError, PlanError):
            continue
        reports: list[str] = []
        plan = ItemPlan.make([item_span(kind, grid)], spec)
        kept = kept_cells(cells, plan, lambda plan, error, to=reports: to.append(str(error)))
        assert len(kept) == plan.entering < n and kept.diff().min() > 0
        if reports:
            assert kept.tolist() == [int((i + 0.5) * n / len(kept)) for i in range(len(kept))]
        seen.append((name, bool(reports)))
    blind = {"random", "uniform"}
    assert {name for name, failed in seen if failed} <= {name for name, _ in seen} - blind
    assert {"kcenter", "divprune", "runlength"} <= {name for name, _ in seen}
    assert any(failed for _, failed in seen) == (scale == "overflow")
