"""The parts of the first hour on a GPU: what each answers, its command, and its time limit."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from tokencomp.inputs.packaged import DEFAULT_MODEL

PYTHON, TOKENCOMP = (sys.executable, "-m"), (sys.executable, "-m", "tokencomp")


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes
    ----------
    name, question
    minutes
        Time limit. It is an estimate until a GPU has run the part.
    command, trial
        Arguments of the process, and of its rehearsal with small shapes on a CPU. Every command
        continues after its last finished step, or starts again in the same folder.
    needs_model
        Whether it runs real weights, so that it is left out where none are given.
    """

    name: str
    question: str
    minutes: float
    command: tuple[str, ...]
    trial: tuple[str, ...]
    needs_model: bool = False


def parts(model: str | None, folder: Path) -> tuple[Part, ...]:
    """All parts in order of worth, for a folder of weights and the folder for their files."""

    def profile(shape: str, tokens: int, *more: str) -> tuple[str, ...]:
        """Time and memory of a whole prompt, of a model with random weights."""
        module = "benchmarks.models.profile_shape"
        return (*PYTHON, module, shape, "--tokens", str(tokens), *more)

    small = ("--layers", "1", "--vision-layers", "1", "--device", "cpu", "--rounds", "1")
    small = (*small, "--ratio", "0.75")
    gpu = ("--device", "cuda", "--dtype", "bfloat16")
    methods = ("--reducer", "auto,bipartite,pyramiddrop", "--ratio", "0.5,0.75,0.9")
    files = {name: str(folder / name) for name in ("prefill", "tower", "accuracy", "serving")}
    decoded, held = (("-o", str(folder / name / "profile.json")) for name in ("decode", "memory"))
    prefill = (*PYTHON, "benchmarks.models.prefill")
    prefill = (*prefill, "--out", f"{files['prefill']}/prefill.jsonl")
    kernels = (*PYTHON, "benchmarks.kernels.run", "--out", str(folder / "kernels/kernels.jsonl"))
    tower = (*PYTHON, "benchmarks.models.tower", "--out", f"{files['tower']}/tower.jsonl")
    weights = (*PYTHON, "benchmarks.models.decoding", "--out")
    weights = (*weights, str(folder / "weights" / "decoding.json"))
    accuracy = (*TOKENCOMP, "eval", "--data", "shapesqa", "--tasks", "shapesqa")
    accuracy = (*accuracy, "--output", files["accuracy"])
    serving = (*PYTHON, "benchmarks.gpu.serve_table", "--runs", files["serving"])
    vllm = importlib.util.find_spec("vllm") is not None
    engine = "vllm" if vllm else "hf"
    clients = (*PYTHON, "benchmarks.serving.clients", "--allow-dirty")
    clients = (*clients, "--out", str(folder / "clients" / "clients.jsonl"))
    few = ("--hidden", "256", "--layers", "2", "--frames", "4", "--side", "112")
    under_load = Part(
        "clients", "Is a vLLM server faster under load than plain vLLM and its EVS?", 12,
        (*clients, "--shape", "3b", "--dtype", "bfloat16", "--device", "cuda", "--side", "448"),
        (*clients, *few, "--clients", "1", "2", "--rounds", "1"),
    )  # fmt: skip
    tests = (*PYTHON, "pytest", "-m", "gpu", "-n", "0")
    return (
        Part(
            "tests", "Are the kernels right, and is dropping exact, on this card?", 8,
            (*tests, "tests/kernels", "tests/exactness"),
            (*tests, "tests/exactness/test_gpu.py", "tests/exactness/test_quantized_weights.py"),
        ),
        Part(
            "prefill", "How close are prefills to their FLOP limit?", 10,
            (*prefill, "--parts", "gpu", "--device", "cuda"), (*prefill, "--parts", "tiny"),
        ),
        Part(
            "kernels", "How close are the kernels to their roofline?", 4, kernels,
            (*kernels, "--scale", "0.01", "--repeats", "1", "--ops", "topk_stable"),
        ),
        Part(
            "tower", "How much sooner is the first token when patches leave before the tower?", 6,
            (*tower, *gpu, "--rounds", "3", "--minutes", "5"),
            (*tower, "--part", "28", "--side", "56", "--rounds", "1", "--cases", "qwen-video"),
        ),
        Part(
            "decode", "How fast is decoding after a compressed prompt?", 4,
            (*profile("qwen2-vl-2b", 8192, *gpu, *methods), *decoded),
            (*profile("llava-onevision-0.5b", 200, *small, "--reducer", "auto"), *decoded),
        ),
        Part(
            "weights", "What adds the weights of merged tokens sooner: a mask, or wider heads?", 6,
            (*weights, "--device", "cuda"),
            (*weights, "--allow-dirty", "--shapes", "qwen2-vl-2b", "--tokens", "64"),
        ),
        Part(
            "memory", "How much memory does a long clip need?", 6,
            (*profile("qwen2.5-vl-3b", 32768, *gpu, "--rounds", "2", "--ratio", "0.5,0.9"), *held),
            (*profile("llava-onevision-0.5b", 400, *small, "--reducer", "auto"), *held),
        ),
        Part(
            "accuracy", "How much of its accuracy does this model keep?", 12,
            (*accuracy, "--model", str(model), "--limit", "55", "--ratio", "0.75",
             "--reducer", "auto,uniform,divprune,fastv"),
            (*accuracy, "--model", DEFAULT_MODEL, "--limit", "2", "--ratio", "0.75",
             "--no-baselines"),
            needs_model=True,
        ),
        Part(
            "serving", "How many more requests per second does a server answer?", 10,
            (*serving, "--model", str(model), "--engine", engine),
            (*serving, "--model", DEFAULT_MODEL, "--engine", "hf", "--trial"), needs_model=True,
        ),
        *([under_load] if vllm else []),
    )  # fmt: skip
