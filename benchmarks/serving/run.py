"""Time to first token and throughput of vLLM with and without compression, on this machine.

    python -m benchmarks.serving.run             # → results.jsonl, results.md
    python -m benchmarks.serving.run --report    # only rebuilds the page

Engines run one after another: stock vLLM; tokencomp's plugin, whose arms share one engine because
ratios are per request; vLLM's own EVS and VidCom2. The model has random weights in the layout of
Qwen2.5-VL, a decoder as wide as Qwen2.5-0.5B's and half as deep, and a small vision tower, in fp32.
No cache has seen the videos before. An engine that fails gets a line with its error. vLLM's pruning
then runs once more with the one flag set that its CPU runner leaves off. Needs vLLM (see the extra
`vllm`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import publishing
from benchmarks.experiment import Experiment

TOWER = {
    "depth": 4, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4,
    "window_size": 112, "fullatt_block_indexes": [1, 3],
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }
}  # fmt: skip
"""Sizes of published models, Qwen2.5-VL-3B's with heads of 128 dimensions."""


def build(folder: Path, hidden: int = 512, layers: int = 8, shape: str | None = None) -> Path:
    """Write a Qwen2.5-VL folder with the embedded models' tokenizer and processors.

    `shape` is one of `SHAPES`; without it heads have 64 dimensions and the tower is small.
    """
    from safetensors.torch import save_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from recipes.tiny.families import family
    from recipes.tiny.tokenizer import load_tokenizer, write_tokenizer
    from tokencomp.storage import write_json

    recipe = family("tiny-qwen2-vl")
    write_tokenizer(folder, recipe.chat_template)
    tokenizer = load_tokenizer(folder)
    for name, values in recipe.files(tokenizer).items():
        write_json(folder / name, values)
    config = recipe.config(tokenizer)
    sizes: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": hidden * 38 // 7, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "vision_config": TOWER,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        **(SHAPES[shape] if shape else {}),
    }  # fmt: skip
    tower = {
        "model_type": "qwen2_5_vl", "out_hidden_size": sizes["hidden_size"], "in_channels": 3,
        "in_chans": 3, "hidden_act": "silu", "patch_size": 14, "spatial_patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2,
        **sizes["vision_config"],
    }  # fmt: skip
    config.update(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl",
        num_key_value_heads=2, **{**sizes, "vision_config": tower},
    )  # fmt: skip
    write_json(folder / "config.json", config)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    weights = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        weights[name] = tensor.to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"frames": 16, "side": 224}  # 8 × 64 tokens
RATIOS = (0.5, 0.75)
REDUCERS = ("divprune", "uniform", "evs", "vidcom2")
COMPARED = 0.75  # vLLM's own pruning has one ratio per engine
ENV = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
PLAN: dict[str, Any] = {"engine": {}, "plugin": False, "pruning_flag": False}
"""What a plan has where it says nothing else."""
NOTE = """Time to first token and throughput of a random Qwen2.5-VL on one machine. Factors compare
with the uncompressed arm of the same engine, or with stock vLLM where the engine has none.

vLLM's EVS does not run on CPU without a change: `CPUModelRunner.load_model` never sets the
runner's `is_multimodal_pruning_enabled`, so the position columns that EVS appends to the
embeddings are not removed and do not fit the decoder. The engine "flag set" sets it, in this
benchmark only. This vLLM offers VidCom2 for Qwen3-VL only. [All benchmark pages](../README.md)."""
COLUMNS = (
    "engine", "arm", "prompt tokens", "first token, CPU ms", "×", "TTFT ms", "requests/s", "×",
)  # fmt: skip


def engines() -> dict[str, dict[str, Any]]:
    """What `engine.py` runs, by name; "plugin" is whether ours is on."""
    ours: dict[str, Any] = {"ratio 0": {"request": {"ratio": 0}}}
    for reducer, ratio in itertools.product(REDUCERS, RATIOS):
        ours[f"{reducer} {ratio}"] = {"request": {"reducer": reducer, "ratio": ratio}}
    plans = {
        "stock vLLM": {"arms": {"uncompressed": {"request": None}}},
        "tokencomp": {
            "plugin": True,
            "engine": {"hf_overrides": {"tokencomp": {}}},  # requests choose
            "arms": ours,
        },
    }
    for method in ("evs", "vidcom2"):
        flags = {"video_pruning_rate": COMPARED, "video_pruning_method": method}
        plan = {"engine": flags, "arms": {f"{method} {COMPARED}": {"request": None}}}
        plans[f"vLLM {method}"] = plan
        plans[f"vLLM {method}, flag set"] = {**plan, "pruning_flag": True}
    return {name: {**PLAN, "job": "first", **plan} for name, plan in plans.items()}


def run(model: Path, plan: dict[str, Any], work: Path) -> dict[str, Any]:
    """Arms of one engine process; a failure is a result too."""
    jobs, results = work / "plan.json", work / "results.json"
    jobs.write_text(json.dumps(plan))
    results.unlink(missing_ok=True)
    env = {**os.environ, **ENV, "TOKENCOMP_VLLM": "on" if plan["plugin"] else "off"}
    env.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    command = [sys.executable, "-m", "benchmarks.serving.engine", model, jobs, results]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode == 0 and results.exists():
        return json.loads(results.read_text())
    lines = [line for line in done.stderr.splitlines() if "Error" in line or "Value error" in line]
    last = [line.partition("]: ")[2] or line for line in lines[-1:]]
    failed = last[0].partition(" [type=")[0].strip()[:300] if last else f"exit {done.returncode}"
    return {name: {"failed": failed} for name in plan["arms"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown. Factors are against the uncompressed arm of the same engine, else the stock one.

    Arms of one engine are interleaved. CPU time is that of the first token; it hardly depends on
    what else the machine does.
    """
    good = {(row["engine"], row["arm"]): row for row in rows if "failed" not in row}
    lines = []
    for row in rows:
        arm = [row["engine"], row["arm"]]
        if "failed" in row:
            lines.append([*arm, f"does not run: `{row['failed']}`", *[""] * 5])
            continue
        base = good.get((row["engine"], "ratio 0"), good.get(("stock vLLM", "uncompressed"), row))
        cpu, rate = row["cpu_median_s"], row["throughput_median_rps"]
        times = [f"{1e3 * cpu:.0f}", f"{base['cpu_median_s'] / cpu:.2f}"]
        times += [f"{1e3 * row['ttft_median_s']:.0f}", f"{rate:.2f}"]
        lines.append(
            [*arm, f"{row['prompt']}", *times, f"{rate / base['throughput_median_rps']:.2f}"]
        )
    return publishing.table(COLUMNS, lines, right=6).replace("|  ", "| ")


def page(rows: list[dict[str, Any]]) -> str:
    """The page from the records of one run."""
    title = "# How much sooner is the first token with vLLM?"
    return f"{title}\n\n{table(rows)}\n\n{NOTE}\n\nSetup: {json.dumps(rows[-1]['setup'])}."


def vllm_version() -> str:
    """Version of vLLM, also of builds under another name."""
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    return f"{names[0]} {importlib.metadata.version(names[0])}"


@contextlib.contextmanager
def random_model(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """Yield the folder of a model with random weights, and a folder for files, for a while."""
    from benchmarks.serving.run import build

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "model").mkdir()
        yield build(work / "model", args.hidden, args.layers, getattr(args, "shape", None)), work


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of all engines, one engine after the other."""
    rows: list[dict[str, Any]] = []
    shape = {**SHAPE, "rounds": args.rounds, "requests": args.requests}
    about = {"vllm": vllm_version(), "hidden": args.hidden, "layers": args.layers}
    about.update(dtype="float32", **shape)
    with random_model(args) as (model, work):
        for name, plan in engines().items():
            refused = rows and "not supported" in rows[-1].get("failed", "")
            if plan["pruning_flag"] and ("failed" not in rows[-1] or refused):
                continue  # this vLLM needs no help, or none would do
            for arm, result in run(model, {**plan, **shape}, work).items():
                rows.append({"engine": name, "arm": arm, **result, "setup": about})
                print(table(rows[-1:]).splitlines()[-1], flush=True)
            yield rows


SIZES = {"hidden": 896, "layers": 12}


OPTIONS = {"rounds": 3, "requests": 4, **SIZES}
EXPERIMENT = Experiment("serving/results", measure, page, options=OPTIONS, lines=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
