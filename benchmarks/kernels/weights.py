"""What `merge=True` costs beside dropping, and what else could carry the weights of merged rows.

    python -m benchmarks.kernels.weights

Four tables, in `weights.json` and `weights.md`. Calls and host reads of a prefill and a decode
step are those of the calls page, on its tiny random Qwen2-VL, which is also timed: its layers are
so small that calls take the time, not work. FLOPs follow from the shapes of real models. The last
table is one attention call of a prefill on a CPU, by what carries the logarithms: further head
dimensions, or a mask that SDPA adds. Seconds are those of the process on one thread, the least of
several runs: they order carriers on a CPU and say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.benchmark import Timer

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.kernels.calls import RATIO, counted, prefill, prompt, tiny_model
from tokencomp.engine.stats import LayerShape
from tokencomp.engine.weights import bias_dims, extra_dims, widen
from tokencomp.evaluation import timing

REDUCERS = ("kcenter", "fastv")
ARMS = {"drop": False, "merge": True}
SHAPES = {
    "Qwen2.5-VL 7B": LayerShape(3584, 18944, 28, 4, 128),
    "Qwen3-VL 8B": LayerShape(4096, 12288, 32, 8, 128),
    "LLaVA-OneVision 0.5B": LayerShape(896, 4864, 14, 2, 64),
}
LENGTHS = (1024, 8192)  # rows that are left
HEADS, KV_HEADS, DIM, ROWS = 14, 2, 64, 1024  # the attention call that is timed
RUNS = 5
ALONE, ROUNDS, TOKENS = "no patch", 15, 60  # decode steps of the tiny model, see `steps`


def step(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """Feeds the model one more token after a prefill, at every call."""
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    return lambda: model(input_ids=torch.tensor([[7]]), past_key_values=cache)


def calls(reducer: str, merge: bool) -> dict[str, Any]:
    """Calls and reads that a patch adds to a prefill of four images, and to a decode step."""
    model, inputs = tiny_model(), prompt(1, 4)
    plain = counted(prefill(model, inputs)), counted(step(model, inputs))
    with tokencomp.patch(model, RATIO, reducer=reducer, merge=merge):
        found = counted(prefill(model, inputs)), counted(step(model, inputs))
    pairs = zip(found, plain, strict=True)
    added = [(a.calls - b.calls, a.reads - b.reads) for a, b in pairs]
    own = [one.calls for one in plain]
    return {"reducer": reducer, "merge": merge, "prefill": added[0], "step": added[1], "own": own}


def steps() -> dict[str, list[float]]:
    """Milliseconds of a decode step of the tiny model, in every round: alone, dropping, merging.

    The kinds take turns, so that what slows the machine for a while slows all of them.
    """
    model, inputs = tiny_model(), prompt(1, 4)
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for kind in (ALONE, *ARMS):
            patched = (
                nullcontext() if kind == ALONE else tokencomp.patch(model, RATIO, merge=ARMS[kind])
            )
            with patched, torch.no_grad():
                call = step(model, inputs)
                spent = timing.seconds(call, time.process_time, TOKENS)
            found.setdefault(kind, []).append(1e3 * spent)
    return found


def flops(name: str, rows: int) -> dict[str, Any]:
    """Share of the work of a prefill, and of attention alone, that weights add."""
    shape = SHAPES[name]
    dropped, merged = (shape.flops(rows, 0, weighted) for weighted in (False, True))
    attention = extra_dims(shape.head_dim) / shape.head_dim
    return {"model": name, "rows": rows, "attention": attention, "prefill": merged / dropped - 1}


def carriers() -> dict[str, Callable[[], Tensor]]:
    """One attention call of ROWS rows, by what carries the weights."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, ROWS, DIM, generator=g)
    k, v = (torch.randn(1, KV_HEADS, ROWS, DIM, generator=g) for _ in range(2))
    sizes = torch.randint(1, 9, (1, ROWS), generator=g).float()
    scale = DIM**-0.5
    more = bias_dims(q, k, sizes, scale)  # once for all layers of a call
    seen = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    groups = HEADS // KV_HEADS

    def dropped() -> Tensor:
        return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    def widened() -> Tensor:
        wide = widen(q, k, v, more)
        return sdpa(*wide, is_causal=True, scale=scale, enable_gqa=True)[..., :DIM]

    def masked() -> Tensor:
        bias = sizes.log()[:, None, None].expand(-1, 1, ROWS, -1)
        mask = bias.masked_fill(~seen, -torch.inf)
        full = [t.repeat_interleave(groups, 1) for t in (k, v)]  # SDPA takes no mask beside groups
        return sdpa(q, *full, attn_mask=mask, scale=scale)

    return {"no weights": dropped, "head dimensions": widened, "mask": masked}


def least(call: Callable[[], Any]) -> float:
    """Processor time of one call, the least of RUNS."""
    timer = Timer("call()", globals={"call": call}, timer=time.process_time)
    return float(min(timer.timeit(4).mean for _ in range(RUNS)))


def timed() -> dict[str, float]:
    """Milliseconds of processor time, by carrier; their results are compared first."""
    found = carriers()
    torch.testing.assert_close(found["mask"](), found["head dimensions"](), atol=1e-5, rtol=1e-4)
    return {name: 1e3 * least(call) for name, call in found.items()}


TITLE = "# What does merging with weights cost?"
BELOW = """`merge=True` adds log(count) to the attention logits of every merged row. During
prefill, a few additional head dimensions carry it under every attention backend: no kernel is
replaced and no matrix of rows × rows exists. The cache holds one row for a merged token. A decode
step adds the logarithms by its mask, without a call per layer, or by the same dimensions where
attention takes no numbers or would be slower for a mask. The mask of the last table is the other
carrier in a prefill: it needs SDPA without its flash kernel. [What merging is
for](../../docs/methods.md#merging). `python -m benchmarks.kernels.weights`"""


def page(data: dict[str, Any]) -> str:
    """The page."""
    rows = [
        [r["reducer"], str(r["merge"]), *(f"{c} + {n}" for c, n in (r["prefill"], r["step"]))]
        for r in data["calls"]
    ]
    work = [
        [r["model"], str(r["rows"]), f"{r['attention']:.1%}", f"{r['prefill']:.2%}"]
        for r in data["flops"]
    ]
    own = data["calls"][0]["own"]
    alone = data["steps"][ALONE]
    decoding = []
    for kind, ms in data["steps"].items():
        more = median(a / b for a, b in zip(ms, alone, strict=True)) - 1
        decoding.append([kind, f"{min(ms):.2f}", "" if kind == ALONE else f"{more:+.0%}"])
    names = list(data["time"])
    times = [[n, f"{data['time'][n]:.2f}"] for n in names]
    table = publishing.table
    return "\n\n".join(
        [
            TITLE,
            "## Calls + host reads that a patch adds\n\nFour images, ratio "
            f"{RATIO}, a tiny Qwen2-VL of 8 layers. Without a patch it makes {own[0]} calls "
            f"in a prefill and {own[1]} in a decode step.",
            table(["reducer", "merge", "prefill", "decode step"], rows),
            "## A decode step where calls take the time\n\nThe same model and prompt, the "
            f"default reducer: milliseconds, the least of {ROUNDS} rounds of {TOKENS} tokens, "
            "and the median of the rounds against the unpatched model. Layers of a few thousand "
            "weights have little work, as on a GPU that waits for its next call.",
            table(["", "ms", "against no patch"], decoding),
            "## FLOPs that weights add\n\nOf scores and sums of attention, and of a prefill.",
            table(["model", "rows left", "attention", "prefill"], work),
            f"## One attention call on a CPU\n\nMilliseconds of one thread; {HEADS} heads, "
            f"{KV_HEADS} of keys, {DIM} dimensions, {ROWS} rows, float32. {data['machine']}",
            table(["carrier", "ms"], times),
            BELOW,
        ]
    )


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Counts and times of all tables."""
    torch.set_num_threads(1)
    yield {
        "machine": f"torch {torch.__version__}.",
        "calls": [calls(r, merge) for r in REDUCERS for merge in ARMS.values()],
        "flops": [flops(name, rows) for name in SHAPES for rows in LENGTHS],
        "steps": steps(),
        "time": timed(),
    }


EXPERIMENT = Experiment("kernels/weights", measure, page)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
