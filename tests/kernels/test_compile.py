"""Every op has a correct schema and fake implementation, and works under torch.compile."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokencomp import kernels


def rows(x: Tensor) -> Tensor:
    """The indices of 12 rows in order, on the device of `x`."""
    return torch.arange(12, device=x.device)


CALLS: dict[str, Callable[[Tensor], object]] = {
    "attention_colsum": lambda x: kernels.attention_colsum(
        x.view(1, 2, 3, 16)[:, :, :1], x.view(1, 2, 3, 16)
    ),
    "attention_colsum_iterated": lambda x: kernels.attention_colsum(
        x.view(1, 2, 3, 16), x.view(1, 2, 3, 16), iterations=2, heads="rms"
    ),
    "bipartite_match": lambda x: kernels.bipartite_match(x.view(12, 8), 6),
    "nearest_previous_frame": lambda x: kernels.nearest_previous_frame(x.view(2, 2, 3, 8)),
    "merge_rows": lambda x: kernels.merge_rows(x.view(12, 8), rows(x), rows(x)),
    "gather_rows": lambda x: kernels.gather_rows(
        [x.view(1, 12, 8), x.view(1, 12, 8) > 0], rows(x)[None, 3:]
    ),
    "frame_pool": lambda x: kernels.frame_pool(x.view(2, 2, 3, 8), [(1, 2), (2, 3)]),
    "ccam_attention": lambda x: kernels.ccam_attention(
        *(x.view(1, 2, 6, 8) for _ in range(3)), frames=3
    ),
    "maxmin_select": lambda x: kernels.maxmin_select(
        x.view(12, 8), 4, x[:12].abs(), spans=6, margin=x[:1].abs().expand(2)
    ),
    "mean_distance": lambda x: kernels.mean_distance(x.view(12, 8), spans=[5, 7]),
    "dpp_select": lambda x: kernels.dpp_select(x.view(12, 8), 2, x[:12].abs() + 0.1, spans=6),
    "facility_select": lambda x: kernels.facility_select(x.view(12, 8), 2, x[:12].abs(), spans=6),
    "topk_stable": lambda x: kernels.topk_stable(x, [2, 5], spans=[40, 56]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_whole_graph_compiles_and_agrees(
    name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled graph has no break and gives the shapes, dtypes and values of the eager call."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("TOKENCOMP_KERNELS", backend)
    torch._dynamo.reset()
    x = torch.randn(96, device=device)
    want = torch.utils._pytree.tree_leaves(CALLS[name](x))
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    got = torch.utils._pytree.tree_leaves(compiled(x))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a is None if b is None else torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "attention_colsum_iterated"])
def test_opcheck(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch checks the schema (no hidden aliasing or mutation) and the fake tensors."""
    monkeypatch.setenv("TOKENCOMP_KERNELS", "naive")
    recorded: list[tuple] = []
    module, attribute = {"mean_distance": ("maxmin_select", "_mean_op")}.get(name, (name, "_op"))
    package = __import__("sys").modules[f"tokencomp.kernels.{module}"]
    op = getattr(package, attribute)

    def recorder(*arguments: object) -> object:
        recorded.append(arguments)
        return op(*arguments)

    monkeypatch.setattr(package, attribute, recorder)
    CALLS[name](torch.randn(96, device=device))
    torch.library.opcheck(op, recorded[0], test_utils=("test_schema", "test_faketensor"))
