"""Two ranks that share the heads of every layer choose the tokens that one process chooses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import plans, ranks
from support.families import FAMILIES

import tokencomp
from tokencomp.engine.capture import gather_heads
from tokencomp.errors import UnsupportedModelError

pytestmark = pytest.mark.long

CASES: dict[str, dict[str, Any]] = {
    name: {"reducer": name}
    for name in ("fastv", "pyramiddrop", "prune", "cdpruner", "aim", "condiv+prune")
}
CASES["condiv"] = {"reducer": "condiv", "power": 1.0}
CASES["tower stage"] = {"reducer": "condiv", "tower_ratio": 0.4}
JOBS = ["qwen2_vl", "llava_onevision", "internvl"]
if ranks.takes_plans():
    JOBS += ["qwen3_vl", "tower"]


def decoder_plan() -> dict[str, str]:
    """Transformers has no plan for the decoder of Qwen3-VL."""
    layer = "model.language_model.layers.*"
    return {
        **{f"{layer}.self_attn.{n}": style for n, style in ranks.ATTENTION_PLAN.items()},
        **{f"{layer}.mlp.{n}": style for n, style in ranks.MLP_PLAN.items()},
    }


TOWER_CASES: dict[str, dict[str, Any]] = {
    "attention": {"reducer": plans.TowerTop()},
    "keys": {"reducer": "visionzip"},
    "stage": {"reducer": "condiv", "tower_ratio": 0.4},
    "stage and attention": {"reducer": plans.TowerTop(), "tower_ratio": 0.4},
}


def tower_plan(model: torch.nn.Module) -> dict[str, str]:
    """The heads of a SigLIP tower divided, too."""
    blocks = [n for n, _ in model.named_modules() if n.endswith("layers.0.self_attn")]
    block = next(n for n in blocks if "vision" in n).replace("layers.0", "layers.*")
    names = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "out_proj": "rowwise"}
    return {f"{block}.{n}": style for n, style in names.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By job: what one process finds, and what each of two ranks finds."""
    expected, jobs = {}, {}
    for job in JOBS:
        family = FAMILIES["llava_onevision" if job == "tower" else job]
        model = family.build()
        folder = str(tmp_path_factory.mktemp(job))
        model.save_pretrained(folder)
        plan: Any = decoder_plan() if job in ("qwen3_vl", "tower") else "auto"
        plan = {**plan, **tower_plan(model)} if job == "tower" else plan
        cases = TOWER_CASES if job == "tower" else CASES
        expected[job] = ranks.compressed(model, family, cases)
        jobs[job] = family.name, folder, plan, cases
    found = ranks.run_ranks(ranks.tensor_parallel, 2, jobs)
    return {job: (expected[job], [rank[job] for rank in found]) for job in JOBS}


@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_keep_what_one_process_keeps(results: dict[str, Any], job: str) -> None:
    """Entry and layer stages, all scores, and (job "tower") signals of a divided tower."""
    expected, ranks_found = results[job]
    for found, local_heads in ranks_found:
        assert local_heads == 2  # of 4
        for case, (kept, logits, tokens) in expected.items():
            assert found[case][0] == kept, case
            torch.testing.assert_close(found[case][1], logits, atol=1e-4, rtol=1e-4)
            assert torch.equal(found[case][2], tokens), case


def test_heads_that_nobody_has_are_refused() -> None:
    """Half of the heads without a group of ranks: scores would be another model's."""
    attn = torch.nn.Module()
    attn.q_proj = torch.nn.Linear(4, 4)
    attn.config = SimpleNamespace(num_attention_heads=4)
    whole = torch.randn(1, 4, 3)
    assert gather_heads(attn, whole, dim=1) is whole
    with pytest.raises(UnsupportedModelError, match="2 of its 4 heads"):
        gather_heads(attn, whole[:, :2], dim=1)


def test_heads_are_refused_in_a_call() -> None:
    family = FAMILIES["qwen2_vl"]
    model = family.build()
    family.decoder(model).config.num_attention_heads = 8
    patched = tokencomp.patch(model, 0.5, reducer="condiv")  # scores pictures by attention
    with patched, pytest.raises(UnsupportedModelError, match="4 of its 8"):
        model(**ranks.prompts(family))
