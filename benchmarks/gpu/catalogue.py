"""The tables that a reader with a GPU can fill, one command each: accuracy and serving."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu.load import Work
from tokencomp.errors import UnknownNameError
from tokencomp.inputs.packaged import DEFAULT_MODEL

IMAGE_METHODS = ("uniform", "fastv", "divprune", "cdpruner", "condiv")
VIDEO_METHODS = ("uniform", "vidcom2", "divprune", "bipartite", "condiv")


@dataclass(frozen=True)
class Step:
    """One call of `tokencomp eval`.

    Attributes
    ----------
    frames
        Frames of each video.
    reducers, ratios
        What is measured; without ratios, the full model alone.
    baselines
        Whether `random` (three seeds) and downscaling run at the same ratios.
    """

    frames: int
    reducers: tuple[str, ...]
    ratios: tuple[float, ...]
    baselines: bool = True


@dataclass(frozen=True)
class Table:
    """One published table.

    Attributes
    ----------
    name, title
    model
        Name on the hub.
    tasks
        Of lmms-eval.
    steps
    limit
        Items per task; the same first ones for everybody.
    hours
        Estimate for one H100, from token counts; it has not been measured yet.
    note
        What the reader has to know beside it.
    data
        As in `tokencomp eval --data`; None reads the hub.
    """

    name: str
    title: str
    model: str
    tasks: tuple[str, ...]
    steps: tuple[Step, ...]
    limit: int
    hours: float
    note: str = ""
    data: str | None = None

    def commands(self, folder: str) -> list[list[str]]:
        """Arguments of `tokencomp`, one list per step; `folder` takes the run folders."""
        out = []
        for number, step in enumerate(self.steps):
            line = ["eval", "--model", self.model, "--tasks", ",".join(self.tasks)]
            line += ["--frames", str(step.frames), "--limit", str(self.limit)]
            if step.ratios:
                line += ["--reducer", ",".join(step.reducers)]
                line += ["--ratio", ",".join(f"{r:g}" for r in step.ratios)]
            else:
                line += ["--reducer", "uniform", "--ratio", "0"]
            line += [] if step.baselines and step.ratios else ["--no-baselines"]
            line += ["--data", self.data] if self.data else []
            out.append([*line, "--output", f"{folder}/step-{number}"])
        return out

    def dry(self) -> Table:
        """Every step on the embedded model: one method and ratio, two questions, and no GPU."""
        steps = tuple(
            replace(s, frames=8, reducers=s.reducers[-1:], ratios=s.ratios[:1]) for s in self.steps
        )
        small = {"model": DEFAULT_MODEL, "tasks": ("shapesqa",), "data": "shapesqa", "limit": 2}
        return replace(self, steps=steps, **small)  # type: ignore[arg-type]  # fields by name


@dataclass(frozen=True)
class LoadTable:
    """One published table of a server under load.

    Attributes
    ----------
    name, title, model, hours, note
        As in `Table`.
    ratios, clients
        Ratios that requests ask for, 0 among them, and numbers of clients that ask at once.
    per_client, least
        Requests per client, and requests in all at the least.
    work
        What every request asks.
    engine, arguments
        Of `tokencomp serve`, and its further arguments.
    """

    name: str
    title: str
    model: str
    ratios: tuple[float, ...]
    clients: tuple[int, ...]
    per_client: int
    least: int
    work: Work
    hours: float
    engine: str = "vllm"
    arguments: tuple[str, ...] = ()
    note: str = ""

    def requests(self, clients: int) -> int:
        """Requests of one ratio at so many clients."""
        return max(self.least, self.per_client * clients)

    @property
    def settings(self) -> dict[str, Any]:
        """What the times depend on, ready for JSON; more ratios or clients may join later."""
        shared = {"model": self.model, "engine": self.engine, "arguments": [*self.arguments]}
        counts = {"per_client": self.per_client, "least": self.least, **vars(self.work)}
        return {**shared, **counts, "ratios": [*self.ratios], "clients": [*self.clients]}

    def dry(self) -> LoadTable:
        """A few requests to the embedded model on the server that runs on any machine."""
        work = Work(images=1, side=112, tokens=2)
        small = {"ratios": (0.0, 0.75), "clients": (1, 2), "per_client": 1, "least": 2}
        arguments = ("--max-batch", "2")
        return replace(
            self, model=DEFAULT_MODEL, engine="hf", arguments=arguments, work=work, **small
        )  # type: ignore[arg-type]  # fields by name


def _videos(name: str, title: str, model: str) -> Table:
    """The table of one model on videos of 32 frames."""
    return Table(
        f"videos-{name}",
        f"Videos: {title}, 32 frames",
        model,
        ("mvbench", "longvideobench_val_v", "mlvu_dev", "videomme"),
        (Step(32, VIDEO_METHODS, (0.5, 0.75, 0.9)),),
        limit=150,
        hours=16,
        note="The setting of VidCom2's table (arXiv 2505.14454).",
    )


TABLES = {
    table.name: table
    for table in (
        Table(
            "images-qwen2.5-vl-7b",
            "Images: Qwen2.5-VL-7B, text-heavy and general tasks",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            ("docvqa_val", "chartqa", "ocrbench", "textvqa_val", "mmbench_en_dev", "pope"),
            (Step(8, IMAGE_METHODS, (0.5, 0.75, 0.9)),),
            limit=500,
            hours=8,
            note="The six tasks that the image table of AngelSlim names in public, of its eleven.",
        ),
        _videos(
            "llava-onevision-7b", "LLaVA-OneVision-7B", "llava-hf/llava-onevision-qwen2-7b-ov-hf"
        ),
        _videos("qwen3-vl-8b", "Qwen3-VL-8B", "Qwen/Qwen3-VL-8B-Instruct"),
        Table(
            "lvbench-matched-tokens",
            "LVBench: more frames at the same number of visual tokens, Qwen3-VL-8B",
            "Qwen/Qwen3-VL-8B-Instruct",
            ("lvbench",),
            (
                Step(64, (), ()),
                Step(128, ("random", "condiv"), (0.5,), baselines=False),
                Step(256, ("random", "condiv"), (0.75,), baselines=False),
            ),
            limit=1549,
            hours=14,
            note="64 frames, 128 at ratio 0.5 and 256 at 0.75 cost the decoder the same.",
        ),
    )
}

LOADS = {
    table.name: table
    for table in (
        LoadTable(
            "serving-qwen2.5-vl-7b",
            "Serving under load: Qwen2.5-VL-7B with vLLM, two images of 1008 px a request",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            (0.0, 0.5, 0.75, 0.9),
            (1, 8, 32, 64),
            per_client=8,
            least=32,
            work=Work(images=2, side=1008, tokens=64),
            hours=1.5,
            arguments=(
                "--max-model-len", "8192", "--", "--mm-processor-cache-gb", "0",
                "--no-enable-prefix-caching", "--max-num-seqs", "64",
            ),
            note="2,592 visual tokens a request. One server answers all ratios, so that they "
            "differ in nothing else; no cache has seen the pictures.",
        ),
    )
}  # fmt: skip


def table(name: str) -> Table | LoadTable:
    """A table by name.

    Raises
    ------
    UnknownNameError
        There is no such table.
    """
    every = {**TABLES, **LOADS}
    if name not in every:
        raise UnknownNameError(f"No table {name!r}. Choose one of {', '.join(every)}.")
    return every[name]
