"""The tables that a reader with a GPU can fill, one command each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokencomp.errors import UnknownNameError
from tokencomp.inputs.packaged import DEFAULT_MODEL

IMAGE_METHODS = ("uniform", "fastv", "divprune", "cdpruner", "condiv")
VIDEO_METHODS = ("uniform", "vidcom2", "divprune", "merge", "condiv")


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
        """The same steps on the embedded model and two questions: a trial that needs no GPU."""
        steps = tuple(replace(s, frames=8, reducers=s.reducers[-1:]) for s in self.steps)
        small = {"model": DEFAULT_MODEL, "tasks": ("shapesqa",), "data": "shapesqa", "limit": 2}
        return replace(self, steps=steps, **small)  # type: ignore[arg-type]  # fields by name


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


def table(name: str) -> Table:
    """A table by name.

    Raises
    ------
    UnknownNameError
        There is no such table.
    """
    if name not in TABLES:
        raise UnknownNameError(f"No table {name!r}. Choose one of {', '.join(TABLES)}.")
    return TABLES[name]
