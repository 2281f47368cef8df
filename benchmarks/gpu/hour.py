"""The first hour on a GPU: one command, in order of worth, each part with a time limit.

    python -m benchmarks.gpu.hour --model FOLDER    # everything → results/hour/CARD-COMMIT/
    python -m benchmarks.gpu.hour                   # without real weights: shapes alone
    python -m benchmarks.gpu.hour --rehearse --out FOLDER    # small shapes on a CPU

It needs one GPU with 24 GB and a checkout without changes. FOLDER holds a model that `patch`
supports. Stop it at any time: the same command runs the parts that are not done. Every
part writes its files and a log into a folder of its own; `manifest.json` and the page README.md say
how each ended.
`docs/gpu.md` says what each part answers.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks import publishing
from benchmarks.gpu.load import stop
from benchmarks.publishing import changed_code, environment
from tokencomp.errors import OptionError, TokenCompError
from tokencomp.inputs.packaged import DEFAULT_MODEL
from tokencomp.storage import write_text

MANIFEST = "manifest.json"


class Strict(BaseModel):
    """A part of a manifest: other fields than those named are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(Strict):
    """Where the numbers come from."""

    model: str
    date: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$", description="Of a checkout without changes.")
    versions: dict[str, str]
    hardware: dict[str, Any]


class PartRun(Strict):
    """How one part ended."""

    name: str
    question: str
    status: Literal["done", "failed", "out of time", "left out"]
    seconds: float = Field(ge=0)
    minutes: float = Field(gt=0, description="Time limit.")
    note: str = Field(default="", max_length=2000)


class HourFile(Strict):
    """The manifest of one hour."""

    format: Literal[1] = 1
    about: Origin
    rehearsal: bool
    parts: list[PartRun]


def read_hour(path: Path) -> HourFile:
    """A manifest, checked by its schema.

    Raises
    ------
    OptionError
        It does not fit the schema, or is that of a rehearsal, which measures nothing.
    """
    try:
        hour = HourFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, OSError, ValueError) as error:
        raise OptionError(f"{path}: not the manifest of a first hour ({error}).") from error
    if hour.rehearsal:
        raise OptionError(f"{path}: a rehearsal measures nothing. Remove its folder.")
    return hour


def page(hour: HourFile) -> str:
    """Markdown of one hour, for the folder of its files."""
    about = hour.about
    gpus = ", ".join(about.hardware.get("gpus") or ["no GPU"])
    rows = [
        [part.question, f"[{part.name}]({part.name})", part.status,
         f"{part.seconds / 60:.1f} of {part.minutes:g}"]
        for part in hour.parts
    ]  # fmt: skip
    table = publishing.table(("question", "part", "status", "minutes"), rows)
    facts = f"{gpus}; {about.model}; commit {about.commit[:9]}; {about.date[:10]}."
    command = "`python -m benchmarks.gpu.hour --model FOLDER`"
    return f"# The first hour on a GPU\n\n{command}\n\n{facts}\n\n{table}\n"


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
    weights = (*weights, str(folder / "weights" / "decoding.jsonl"))
    accuracy = (*TOKENCOMP, "eval", "--data", "shapesqa", "--tasks", "shapesqa")
    accuracy = (*accuracy, "--output", files["accuracy"])
    serving = (*PYTHON, "benchmarks.gpu.serve", "--out", f"{files['serving']}/loads.jsonl")
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
    doctor = (*PYTHON, "tokencomp", "doctor", "--json")
    return (
        Part(
            "card", "Which kernels equal plain PyTorch on this card?", 4,
            (*doctor, "--device", "cuda"), doctor,
        ),
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
            (*serving, "--engine", "hf", "--side", "112", "--tokens", "2", "--clients", "1", "2",
             "--least", "2", "--per-client", "1", "--images", "1"),
            needs_model=True,
        ),
        *([under_load] if vllm else []),
    )  # fmt: skip


ROOT = Path(__file__).resolve().parents[2]
TAIL = 600  # characters of a log in the manifest


def run(part: Part, folder: Path, rehearse: bool) -> PartRun:
    """Run one part in a process of its own, and stop it when its time is over."""
    own = folder / part.name
    own.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (own / "log.txt").open("w") as log:
        process = subprocess.Popen(
            part.trial if rehearse else part.command,
            stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=60 * part.minutes)
            status = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            stop(process)
    seconds = round(time.monotonic() - started, 1)
    end = "" if status == "done" else (own / "log.txt").read_text(errors="replace")[-TAIL:]
    return _ended(part, status, seconds, end)


def _ended(part: Part, status: str, seconds: float, note: str) -> PartRun:
    facts = {"name": part.name, "question": part.question, "minutes": part.minutes}
    return PartRun.model_validate({**facts, "status": status, "seconds": seconds, "note": note})


def hour(model: str | None, folder: Path, rehearse: bool) -> HourFile:
    """Run the parts that are not done; the manifest is written after each.

    Raises
    ------
    OptionError
        The folder holds another commit, model or card.
    """
    facts = environment()
    about = {k: facts.get(k) for k in ("date", "commit", "versions", "hardware")}
    about["model"] = Path(model).name if model else "random weights"
    if rehearse:  # its commit need not be one without changes
        about["commit"] = str(about["commit"] or "0" * 40)[:40]
    file = HourFile.model_validate({"about": about, "rehearsal": rehearse, "parts": []})
    done, every = _done(folder, file), parts(model, folder)
    ended = {part.name: done[part.name] for part in every if part.name in done}
    file = file.model_copy(update={"parts": [*ended.values()]})
    for part in every:
        if part.name in done:
            continue
        print(f"{part.name}: {part.question} (at most {part.minutes:g} minutes)", flush=True)
        if part.needs_model and not model and not rehearse:
            note = "no real weights: give --model"
            result = _ended(part, "left out", 0, note)
        else:
            result = run(part, folder, rehearse)
        print(f"{part.name}: {result.status} after {result.seconds:.0f} s", flush=True)
        ended[part.name] = result
        ordered = [ended[one.name] for one in every if one.name in ended]
        file = file.model_copy(update={"parts": ordered})
        write_text(folder / MANIFEST, file.model_dump_json(indent=1) + "\n")
        write_text(folder / "README.md", page(file))
    return file


def _done(folder: Path, file: HourFile) -> dict[str, PartRun]:
    """Parts that an earlier call has finished."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    known = HourFile.model_validate_json(path.read_text()) if file.rehearsal else read_hour(path)
    for name in ("commit", "model"):
        before, now = getattr(known.about, name), getattr(file.about, name)
        if before != now:
            raise OptionError(
                f"{folder} holds an hour of {name} {before}, and this one has {now}. "
                "Give another folder with --out."
            )
    return {part.name: part for part in known.parts if part.status == "done"}


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; 0 if every one is done or left out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub name of real weights")
    parser.add_argument("--out", type=Path, help="default: results/hour/CARD-COMMIT")
    parser.add_argument("--rehearse", action="store_true", help="small shapes on a CPU")
    options = parser.parse_args(arguments)
    if options.rehearse and options.out is None:
        parser.error("a rehearsal measures nothing: name a folder for its files with --out")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU is present. Use --rehearse to try the parts on a CPU")
    try:
        if not options.rehearse and (changed := changed_code(ROOT)):
            raise OptionError(f"{', '.join(changed[:3])} has uncommitted changes. Commit them.")
        folder = options.out or _folder()
        file = hour(options.model, folder.resolve(), options.rehearse)
    except TokenCompError as error:
        print(f"error: {error}")
        return 2
    print(f"{folder}: docs/gpu.md says how to send it")
    return int(any(part.status in ("failed", "out of time") for part in file.parts))


def _folder() -> Path:
    card = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "results" / "hour" / f"{card}-{str(environment()['commit'])[:9]}"


if __name__ == "__main__":
    raise SystemExit(main())
