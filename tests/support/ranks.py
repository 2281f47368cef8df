"""Several processes on one machine, connected by gloo, and what they run in the tests."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import tokencomp
from support.families import FAMILIES, Family, text

ATTENTION_PLAN = {
    "q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise",
}  # fmt: skip
MLP_PLAN = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


def run_ranks(work: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """What `work(rank, *args)` returns in every one of `world` connected processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, work, args), nprocs=world)
        return [torch.load(Path(folder) / str(r), weights_only=False) for r in range(world)]


def _rank(rank: int, world: int, folder: str, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        torch.save(work(rank, *args), Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()


def prompts(family: Family) -> dict[str, Tensor]:
    """A ragged batch with an image, the same in every process."""
    torch.manual_seed(7)
    return family.batch(
        [[text(3), family.image(), text(5, 2)], [text(2), family.image(1), text(4)]]
    )


# -- tensor parallelism -------------------------------------------------------------------------


def load_sharded(family: Family, folder: str, plan: Any) -> nn.Module:
    """The saved model, its weights divided over the ranks by `plan`."""
    arguments: dict[str, Any] = {"tp_plan": plan}
    if takes_plans():
        from transformers.distributed import DistributedConfig

        arguments = {"distributed_config": DistributedConfig(tp_plan=plan)}
    return family.model_class().from_pretrained(folder, **arguments).eval()


def takes_plans() -> bool:
    """Whether the release divides what a plan of ours names, and not its own plan alone."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return False
    return "tp_plan" in {field.name for field in dataclasses.fields(DistributedConfig)}


def compressed(model: nn.Module, family: Family, cases: dict[str, dict[str, Any]]) -> dict:
    """Kept tokens, logits and generated tokens of every case."""
    inputs, results = prompts(family), {}
    for name, options in cases.items():
        with torch.no_grad(), tokencomp.patch(model, 0.6, **options) as handle:
            logits = model(**inputs).logits
            kept = [handle.stats.kept(b) for b in range(2)]
            tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
            results[name] = kept, logits, tokens
    return results


def tensor_parallel(rank: int, jobs: dict[str, tuple[str, str, Any, dict]]) -> dict[str, Any]:
    """`compressed` on sharded weights, and how many heads this rank has at layer 0, by job.

    A job is the family's name, the folder of the model, the plan that divides it, and the cases.
    """
    results = {}
    for job, (name, folder, plan, cases) in jobs.items():
        family = FAMILIES[name]
        model = load_sharded(family, folder, plan)
        widths: list[int] = []
        projection = family.decoder(model).layers[0].self_attn.q_proj
        projection.register_forward_hook(
            lambda module, args, out, w=widths: w.append(out.shape[-1])
        )
        results[job] = compressed(model, family, cases), widths[0] // 16
    return results


# -- data parallelism ---------------------------------------------------------------------------


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the loss on the last three tokens, by the model's own names, and the loss."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    grads = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            grads[name.removeprefix("module.")] = grad.clone()
    return {**grads, "loss": loss.detach()}


def wrapped(way: str, model: nn.Module, family: Family) -> nn.Module:
    """`model` under data parallelism of one kind."""
    layers = family.decoder(model).layers
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer.self_attn if way == "fsdp2-attention" else layer, mesh=mesh)
    return fully_shard(model, mesh=mesh) or model


def data_parallel(rank: int, cases: list[tuple[str, str, str, str]]) -> Any:
    """A training step by (family, way, reducer, what comes first), and the same in one process.

    What comes first is "patch" or "wrap". All ranks have one batch, so that the mean over ranks
    is what one process computes.
    """
    results = {}
    for case in cases:
        name, way, reducer, first = case
        family = FAMILIES[name]
        inputs, model = prompts(family), family.build().train()
        with tokencomp.patch(model, 0.5, reducer=reducer) as handle:
            expected = gradients(model, inputs), handle.stats.kept(0)
        if first == "patch":
            handle = tokencomp.patch(model, 0.5, reducer=reducer)
            outer = wrapped(way, model, family)
        else:
            outer = wrapped(way, model, family)
            handle = tokencomp.patch(outer, 0.5, reducer=reducer)
        found = gradients(outer, inputs), handle.stats.kept(0)
        tokencomp.unpatch(outer)
        results[case] = expected, found
    return results
