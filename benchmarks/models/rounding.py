"""What bfloat16 does to the weights of merged tokens, by what carries them after the prompt.

    python -m benchmarks.models.rounding             # → rounding.json, .md
    python -m benchmarks.models.rounding --report    # only rebuilds the page

Three tables: the error of log(weight) against float64; logits of decode steps of embedded models in
bfloat16 against the same steps in float64, on the same rounded cache; and answers of these models
to validation questions, in bfloat16 and in float32. Every table has dropping, which adds no
weights: its errors are those of bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tokencomp
from benchmarks import publishing
from benchmarks.experiment import Experiment
from tokencomp.engine import later
from tokencomp.engine.weights import Carrier, bias_dims
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.settings import MERGE, Setting
from tokencomp.inputs.prompts import build_inputs
from tokencomp.zoo import load
from tokencomp.zoo.shapesqa.examples import shapesqa
from tokencomp.zoo.shapesqa.items import items

MODELS = ("tiny-qwen3-vl-hard", "tiny-qwen2-vl")
FAMILIES = ("attribute", "count", "existence", "position")
LARGEST, DIM = 400, 128  # tokens that a row represents, and dimensions of a head
RATIO, STEPS = 0.75, 4
DROPPED = "dropped"
WAYS: dict[str, torch.dtype | None] = {
    "mask, float32": torch.float32, "mask, bfloat16": torch.bfloat16, "wider heads": None,
}  # fmt: skip


@contextmanager
def carried(way: str) -> Iterator[None]:
    """A block in which later calls add the weights of merged tokens this way."""
    forced = Carrier(WAYS[way], "forced by this benchmark")
    with mock.patch.object(later, "carrier", lambda *_: forced):
        yield


def errors() -> dict[str, list[float]]:
    """Largest and mean error of log(n) for n up to `LARGEST`, by what carries it."""
    sizes = torch.arange(1.0, LARGEST + 1)
    exact, found = sizes.double().log(), {}
    scaling = DIM**-0.5
    q = torch.zeros(1, 1, 1, DIM, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, LARGEST, DIM, dtype=torch.bfloat16)
    more = bias_dims(q, k, sizes[None], scaling)
    for way, dtype in WAYS.items():
        if dtype is None:
            product = more.of_keys[0, 0].double() @ more.of_queries.double()
            carried_logs = scaling * product
        else:
            carried_logs = sizes.log().to(dtype).double()
        away = (carried_logs - exact).abs()
        found[way] = [float(away.max()), float(away.mean())]
    return found


def questions(count: int, folder: Path) -> list[Any]:
    """Validation questions about images, `count` of each family."""
    return shapesqa(items("validation", count, FAMILIES), folder)


@torch.no_grad()
def logits(model: Any, exact: Any, inputs: dict[str, Tensor], merge: Any, way: str) -> list[float]:
    """Errors of the logits of decode steps: largest of every step, in bfloat16 against float64.

    Both start from the cache that the prompt has left in bfloat16.
    """
    rounded = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    found: dict[str, list[Tensor]] = {}
    with (
        tokencomp.patch(model, RATIO, merge=merge) as handle,
        tokencomp.patch(exact, RATIO, merge=merge),
    ):
        cache = model(**rounded, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        for layer in twin.layers:
            layer.keys, layer.values = layer.keys.double(), layer.values.double()
            layer.owner = exact_owner(exact)
        assert handle.stats
        exact.model.rope_deltas = model.model.rope_deltas  # which the prompt has set
        for name, one, held in (("rounded", model, cache), ("exact", exact, twin)):
            dtype = torch.float64 if name == "exact" else WAYS.get(way)
            forced = Carrier(dtype, "forced by this benchmark")
            with mock.patch.object(later, "carrier", lambda *_, to=forced: to):
                for token in range(STEPS):
                    out = one(input_ids=torch.tensor([[10 + token]]), past_key_values=held)
                    found.setdefault(name, []).append(out.logits[0, -1].double())
    pairs = zip(found["rounded"], found["exact"], strict=True)
    return [float((a - b).abs().max()) for a, b in pairs]


def exact_owner(model: Any) -> Any:
    """The owner of the caches of a patched model, so that a cache of its twin may be used."""
    from tokencomp.handle import handle_of

    handle: Any = handle_of(model)
    return handle._hooks.decoder._owner


def logit_errors(name: str, asked: list[Any]) -> dict[str, list[float]]:
    """Mean and largest error of the logits of a model, by way; over all questions and steps."""
    rounded, processor = load(name, torch.bfloat16)
    exact = copy.deepcopy(rounded).double()
    every: dict[str, list[float]] = {}
    for example in asked:
        inputs = dict(build_inputs(processor, [example.load(8)], [example.prompt]))
        for way in (DROPPED, *WAYS):
            away = logits(rounded, exact, inputs, way != DROPPED, way)
            every.setdefault(way, []).extend(away)
    return {way: [statistics.fmean(away), max(away)] for way, away in every.items()}


def answers(name: str, asked: list[Any]) -> dict[str, dict[str, Any]]:
    """Right answers in bfloat16, and answers that equal those in float32, by way."""
    merged = Setting("kcenter", RATIO, **{MERGE: True})
    dropped = Setting("kcenter", RATIO)
    found: dict[str, dict[str, Any]] = {}
    texts: dict[tuple[str, Setting], list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, processor = load(name, dtype)
        for way in (DROPPED, *WAYS):
            if dtype == torch.float32 and way not in (DROPPED, "mask, float32"):
                continue
            setting = dropped if way == DROPPED else merged
            block = nullcontext() if way == DROPPED else carried(way)
            with block:
                runs = sweep(model, processor, asked, [setting], batch_size=1, progress=False)
            records = runs[setting].records
            predictions = [record["prediction"] for record in records]
            right = sum(bool(record["correct"]) for record in records)
            label = way if dtype == torch.bfloat16 else f"float32, {way}"
            same = texts.setdefault(("float32", setting), predictions)
            equal = sum(a == b for a, b in zip(predictions, same, strict=True))
            found[label] = {"right": right, "as_float32": equal, "questions": len(records)}
    return found


LEGEND = """First table: log(n) of 1 to {largest} tokens against float64, heads of {dim} dimensions.
Logits: {steps} decode steps after every question, ratio {ratio}, bfloat16 against the same steps in
float64 on the same cache. Answers: greedy, {families}; ratio {ratio}. Under SDPA on a CPU `patch`
takes the mask in float32. [All benchmark pages](../README.md)."""


def page(report: dict[str, Any]) -> str:
    """Everything as a Markdown page."""
    log_rows = [[way, f"{most:.1e}", f"{mean:.1e}"] for way, (most, mean) in report["logs"].items()]
    parts = [
        "# What does bfloat16 do to the weights of merged tokens?",
        publishing.table(("log(n) carried by", "largest error", "mean error"), log_rows),
    ]
    for name, found in report["models"].items():
        logit_rows = [
            [way, f"{mean:.3f}", f"{most:.3f}"] for way, (mean, most) in found["logits"].items()
        ]
        answer_rows = [
            [way, f"{r['right']} of {r['questions']}", f"{r['as_float32']} of {r['questions']}"]
            for way, r in found["answers"].items()
        ]
        parts += [
            f"## {name}",
            publishing.table(("", "error of logits, mean", "largest"), logit_rows),
            publishing.table(("", "right", "as in float32"), answer_rows),
        ]
    facts = {"largest": LARGEST, "dim": DIM, "steps": STEPS, "ratio": RATIO}
    legend = LEGEND.format(**facts, families=", ".join(FAMILIES)).replace("\n", " ")
    return "\n\n".join([*parts, legend])


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All models, one after the other."""
    torch.set_num_threads(1)
    report: dict[str, Any] = {"logs": errors(), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        asked = questions(args.per_family, Path(folder))
        for name in args.models:
            few = asked[:: max(1, len(asked) // 16)]
            report["models"][name] = {
                "logits": logit_errors(name, few), "answers": answers(name, asked),
            }  # fmt: skip
            print(name, report["models"][name], flush=True)
            yield report


OPTIONS = {
    "models": ([*MODELS], "embedded models"),
    "per_family": (40, "questions of every family"),
}
EXPERIMENT = Experiment("models/rounding", measure_all, page, options=OPTIONS)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    EXPERIMENT.main(__doc__)
