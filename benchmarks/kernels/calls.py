"""Count the device calls and host reads that a patch adds to one prefill, and to a decode step.

    python -m benchmarks.kernels.calls [--reducers NAME ...] [--quick] [--sites]

On a GPU, every call costs a launch of 5 to 10 µs whatever it computes, and every host read waits
until the device has finished. Neither depends on the sizes of tensors, so a tiny random Qwen2-VL on
a CPU shows them exactly: a dispatch mode counts every aten call. A kernel of `tokencomp.kernels` is
one call; what it reads to check its arguments counts as a read. Calls on tensors that the library
keeps on the host count as well, although they launch nothing: they take time in Python.

The table has reducer × {1, 4, 16 images} × batch {1, 8}: calls and reads per prefill, without those
of the unpatched model, and a patch at ratio 0, which adds none. It is written to `calls.json` and
`calls.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from benchmarks.models.shapes import qwen2_vl
from tokencomp.kernels import checks

# aten calls that block the host until their result is there
READS = {
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive",
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts aten calls while it is active.

    Attributes
    ----------
    calls, reads
        Number of calls, and of those among them that make the host wait.
    sites
        Line of the library (or of the model) and call → how often; host reads stand there as
        `read` once more.
    """

    def __init__(self, sites: bool = False) -> None:
        super().__init__()
        self.calls = self.reads = 0
        self._in_kernel = False
        self.sites: Counter[str] | None = Counter() if sites else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        self._note(func.overloadpacket.__name__)
        if func.overloadpacket.__name__ in READS:
            self._read()
        # What the plain version of a kernel copies to the host is no part of the Triton version.
        self._in_kernel = func.namespace == "tokencomp"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._in_kernel = False

    def _note(self, name: str) -> None:
        if self.sites is not None:
            self.sites[f"{_site()} {name}"] += 1

    def _read(self) -> None:
        self.reads += 1
        self._note("read")

    def count_check(self, condition: Tensor, message: str) -> None:
        """Replaces `checks.holds`, which reads its condition inside of a kernel."""
        self._read()
        assert bool(condition), message

    @contextlib.contextmanager
    def copies(self) -> Iterator[None]:
        """Count copies to the host (`cpu`, `tolist`), which on a CPU call nothing, as reads."""
        cpu, tolist = Tensor.cpu, Tensor.tolist

        def count_cpu(tensor: Tensor, *args: Any) -> Tensor:
            if not self._in_kernel:
                self._read()
            copy = cpu(tensor, *args)
            copy.is_host_copy = True  # type: ignore[attr-defined]  # read below
            return copy

        def count_list(tensor: Tensor) -> Any:
            if not (self._in_kernel or hasattr(tensor, "is_host_copy")):
                self._read()
            return tolist(tensor)

        with (
            mock.patch.object(Tensor, "cpu", count_cpu),
            mock.patch.object(Tensor, "tolist", count_list),
            mock.patch.object(checks, "holds", self.count_check),
        ):
            yield


def _site() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "tokencomp" in frame.filename and "benchmarks" not in frame.filename:
            return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"
    return "model"


REDUCERS = (
    "uniform", "random", "divprune", "bipartite", "auto", "cdpruner", "pool", "evs", "vidcom2",
    "prune", "aim", "fastv", "pyramiddrop", "adsc",
)  # fmt: skip
# More calls and reads for one image, and as many for more.
COMPARATORS = (
    "dart", "mmtok", "anchorprune", "scope", "visionzip", "visprune", "hiprune", "holov", "fastvid",
    "flashvid", "holitom", "tango",
)  # fmt: skip
OFF = "ratio 0"  # a patch that does nothing, whatever its reducer
CASES = (OFF, *REDUCERS, *COMPARATORS)
IMAGES, BATCHES = (1, 4, 16), (1, 8)
RATIO, SIDE, LAYERS = 0.75, 6, 8


@dataclass(frozen=True)
class Row:
    """Calls and reads that a reducer adds to a prefill of `batch` rows of `images` images."""

    reducer: str
    images: int
    batch: int
    stages: int
    model_calls: int
    calls: int
    reads: int


def tiny_model(layers: int = LAYERS) -> nn.Module:
    """A random Qwen2-VL with this number of decoder layers."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, range(150, 154), strict=True))
    options: dict[str, Any] = {"mlp_ratio": 2, "patch_size": 4}
    return qwen2_vl(64, 64, layers, 4, 2, 200, sections=(2, 3, 3), ids=ids, theta=1e4, **options)


def prompt(batch: int, images: int) -> dict[str, Tensor]:
    """`batch` equal rows of `images` images of SIDE × SIDE tokens, and a question."""
    picture = [152, *[150] * SIDE**2, 153]
    ids = torch.tensor([[5, 6, *picture * images, 20, 21, 22, 30]] * batch)
    patches = torch.randn(batch * images * 4 * SIDE**2, 96)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 150).int(),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 2 * SIDE, 2 * SIDE]] * batch * images),
    }


def counted(call: Callable[[], Any], sites: bool = False) -> Calls:
    """Calls of the second of two runs; the first fills caches."""
    with torch.no_grad():
        call()
        calls = Calls(sites)
        with calls.copies(), calls:
            call()
    return calls


def prefill(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1)


def patched(model: Any, reducer: str) -> tokencomp.Handle:
    """The patch of one line of the table."""
    if reducer == OFF:
        return tokencomp.patch(model, 0.0)
    return tokencomp.patch(model, RATIO, reducer=reducer)


def measure(
    model: Any, reducer: str, images: int, batch: int, sites: bool = False
) -> tuple[Row, Counter[str]]:
    """What `reducer` adds to a prefill, and by `sites` where."""
    inputs = prompt(batch, images)
    before = counted(prefill(model, inputs), sites)
    with patched(model, reducer) as handle:
        after = counted(prefill(model, inputs), sites)
        stages = len(handle.plan.stages)
    added = after.calls - before.calls, after.reads - before.reads
    row = Row(reducer, images, batch, stages, before.calls, *added)
    return row, (after.sites or Counter()) - (before.sites or Counter())


def step_after(model: Any) -> Callable[[], Any]:
    """A decode step behind a prefill."""
    with torch.no_grad():
        cache = model(**prompt(1, 1), use_cache=True).past_key_values
    token = torch.tensor([[7]])
    return lambda: model(input_ids=token, past_key_values=cache)


def decode_step(model: Any, reducer: str) -> tuple[int, int]:
    """Calls and reads that a patch adds to a decode step."""
    before = counted(step_after(model))
    with patched(model, reducer):
        after = counted(step_after(model))
    return after.calls - before.calls, after.reads - before.reads


SHOWN = ((1, 1), (16, 8))
"""Images and batch of the cases on the page; calls.json has all."""


def page(stored: dict[str, Any]) -> str:
    """The page, one line per reducer."""
    rows, steps = [Row(**row) for row in stored["rows"]], stored["decode"]
    by_shape = {(r.reducer, r.images, r.batch): r for r in rows}
    body = []
    for name in dict.fromkeys(r.reducer for r in rows):
        own = [by_shape[name, i, b] for i, b in SHOWN]
        pairs = [*((r.calls, r.reads) for r in own), steps[name]]
        cells = [f"{calls} + {reads}" for calls, reads in pairs]
        body.append([name, str(own[0].stages), *cells])
    model = [next(r.model_calls for r in rows if (r.images, r.batch) == s) for s in SHOWN]
    head = ["reducer", "stages", *(f"images × batch: {i} × {b}" for i, b in SHOWN), "decode step"]
    below = (
        f"Device calls + host reads that a patch adds to a prefill and to a decode step, at ratio "
        f"{RATIO} with {LAYERS} decoder layers. The unpatched model has {model[0]} and {model[1]} "
        "calls. [All shapes](calls.json). `python -m benchmarks.kernels.calls`."
    )
    title = "# How many device calls and host reads does a patch add?"
    return f"{title}\n\n{publishing.table(head, body)}\n\n{below}"


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All reducers and shapes; with `--sites` or `--quick` counts are only printed."""
    torch.set_num_threads(1)
    model, rows = tiny_model(), []
    if args.sites:
        for name in args.reducers:
            row, sites = measure(model, name, 1, 1, sites=True)
            print(row)
            print("\n".join(f"{n:5d} {site}" for site, n in sorted(sites.items())))
        return
    shapes = [(1, 1), (4, 1), (1, 8)] if args.quick else [(i, b) for b in BATCHES for i in IMAGES]
    for name in args.reducers:
        rows += [measure(model, name, images, batch)[0] for images, batch in shapes]
        counts = (f"{r.images}x{r.batch}: {r.calls}+{r.reads}" for r in rows[-len(shapes) :])
        print(name, *counts, flush=True)
    if not args.quick:
        steps = {name: decode_step(model, name) for name in args.reducers}
        found = [asdict(row) for row in rows]
        yield {"torch": torch.__version__, "rows": found, "decode": steps}


OPTIONS = {
    "reducers": (list(CASES), "", CASES),
    "quick": (False, "1 and 4 images, batch 1 and 8 × 1"),
    "sites": (False, "print the lines that call or read, for 1 image"),
}
EXPERIMENT = Experiment("kernels/calls", measure_all, page, options=OPTIONS)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
