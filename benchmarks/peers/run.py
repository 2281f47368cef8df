"""What public peers from the package index do on the same model and inputs, in one process.

    pip install --no-deps sparsevlm flowcut
    python -m benchmarks.peers.run             # writes peers.json and peers.md beside this file
    python -m benchmarks.peers.run --report    # only rebuilds peers.md

Every peer gets the embedded Qwen2-VL and one image prompt, and is judged by the rows that its
decoder layers really received, counted with hooks. An exception is a result, too.
vLLM's own pruning is compared in the serving benchmark.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from tokencomp.adapters.registry import adapter_for
from tokencomp.errors import OptionError
from tokencomp.evaluation.profiler import counted_rows
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.prompts import build_inputs
from tokencomp.zoo import SAMPLES

QUESTION = "What color is the circle?"
MISSING = "not installed"


@dataclass
class Outcome:
    """`rows` are the rows that each decoder layer got in the prefill."""

    peer: str
    version: str
    what: str
    works: bool
    rows: list[int]
    detail: str


def rows_of(model: Any, run: Callable[[], None]) -> list[int]:
    """Rows that every decoder layer received in the prefill, the first call of all layers."""
    with counted_rows(model) as rows:
        run()
    return rows[: len(adapter_for(model).layers)]


def images(count: int) -> list[list[Any]]:
    from tokencomp.inputs.media import load_media

    files = sorted(SAMPLES.glob("*.jpg"))
    return [[load_media(files[k % len(files)])] for k in range(count)]


def answer(model: Any, inputs: dict[str, Any]) -> None:
    with torch.inference_mode():
        model.generate(**inputs, do_sample=False, max_new_tokens=4)


def use_tokencomp(model: Any, inputs: dict[str, Any]) -> str:
    with tokencomp.patch(model, 0.75) as handle:
        answer(model, inputs)
        return f"ratio reached {handle.stats.ratio:.3f}"  # type: ignore[union-attr]  # a prompt has run


def use_sparsevlm(model: Any, inputs: dict[str, Any]) -> str:
    peer = importlib.import_module("sparsevlm")
    state = peer.apply_sparsevlm(model, n_vis=64, target_layers=[2], min_keep=8)
    answer(model, inputs)
    return f"its own count of visual tokens afterwards: {state.get('n_vis')}"


def use_flowcut(model: Any, inputs: dict[str, Any]) -> str:
    peer = importlib.import_module("flowcut")
    peer.flowcut(model, target_num=16)
    answer(model, inputs)
    return ""


PEERS = {"tokencomp": use_tokencomp, "sparsevlm": use_sparsevlm, "flowcut": use_flowcut}


def attempt(peer: str, rows: int, attention: str) -> Outcome:
    """One peer on a fresh model and a batch of `rows` prompts."""
    model, processor = load_model(attention=attention, device="cpu")
    inputs = build_inputs(processor, images(rows), [QUESTION] * rows)
    full = rows_of(model, lambda: answer(model, inputs))
    details: list[str] = []
    seen: list[int] = []
    try:
        seen = rows_of(model, lambda: details.append(PEERS[peer](model, inputs)))
    except Exception as error:  # whatever a peer raises is its result
        first = (str(error).strip().splitlines() or [""])[0]
        details = [f"{type(error).__name__}: {first.split(' (/')[0]}"]
        seen = []
    works = bool(seen) and sum(seen) < sum(full)
    if seen and not works:
        details.append("ran, and no layer saw fewer tokens")
    what = (
        "one image prompt" if rows == 1 else f"batch of {rows} image prompts"
    ) + f", {attention}"
    return Outcome(peer, _version(peer), what, works, seen, "; ".join(t for t in details if t))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


def table(outcomes: list[Outcome]) -> str:
    body = []
    for o in outcomes:
        rows, works = " ".join(map(str, o.rows)) or "–", "yes" if o.works else "no"
        body.append([o.peer, o.version, o.what, works, rows, o.detail.replace("|", "\\|")])
    head = ("peer", "version", "input", "works", "rows per layer", "detail")
    return publishing.table(head, body)


def page(report: dict[str, Any]) -> str:
    """The page from what peers.json holds."""
    outcomes = [Outcome(**one) for one in report["outcomes"]]
    return (
        "# Do other packages work on the same model?\n\n"
        "Every package is applied to the embedded tiny-qwen2-vl with 64 visual tokens per image. "
        'A package "works" if some decoder layer received fewer rows than without it. '
        f"[All benchmark pages](../README.md).\n\n{table(outcomes)}"
    )


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every peer, one prompt and a batch of two, under two kinds of attention."""
    missing = [peer for peer in PEERS if _version(peer) == MISSING]
    if missing:
        command = f"pip install --no-deps {missing[0]} ..."
        raise OptionError(f"not installed: {', '.join(missing)}. {command}")
    cases = itertools.product(PEERS, ("sdpa", "eager"), (1, 2))
    yield {"outcomes": [asdict(attempt(peer, rows, how)) for peer, how, rows in cases]}


EXPERIMENT = Experiment("peers/peers", measure, page)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
