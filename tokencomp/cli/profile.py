"""`tokencomp profile`: where time and memory go, with and without compression."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli._methods import Settings, settings

LINES = (
    ("ratio reached", "achieved_ratio", "{:.3f}"),
    ("tower ratio reached", "tower_ratio", "{:.3f}"),
    ("tokens per layer", "tokens_per_layer", "tokens"),
    ("preprocess", "preprocess_s", "ms"),
    ("vision tower", "vision_s", "ms"),
    ("reduce", "reduce_s", "ms"),
    ("LLM prefill", "prefill_s", "ms"),
    ("total after preprocess", "total_s", "ms"),
    ("decode per token", "decode_s_per_token", "ms"),
    ("peak memory", "peak_bytes", "bytes"),
    ("KV cache", "kv_bytes", "bytes"),
    ("LLM FLOPs", "flops", "count"),
    ("LLM, times as fast", "speedup", "{:.2f}×"),
    ("limit by FLOPs", "flop_limit", "{:.2f}×"),
    ("limit reached", "limit_reached", "{:.0%}"),
    ("reducer overhead", "reduce_overhead", "{:.1%}"),
    ("in all, times as fast", "total_speedup", "{:.2f}×"),
    ("answer of 16 tokens", "answer_16", "{}"),
    ("answer of 256 tokens", "answer_256", "{}"),
)
"""Lines of the table: name, key of the row, and the form of its value."""
BLOCK = 3
"""Settings next to the full model in one table."""


@opt.flat
def command(
    context: typer.Context,
    method: opt.MethodOptions,
    source: opt.Source,
    files: opt.Files,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds after a warm-up.")] = 5,
    as_json: opt.Json = False,
) -> None:
    """Split a prompt's time: file, preprocess, vision tower, reduce, LLM prefill, decode per token.

    Full model and every reducer × ratio alternate in one process; medians. With peak memory, KV
    bytes, FLOPs, and the fraction reached of the speed-up that FLOPs allow.
    """
    settings_of = settings(context, method)
    from tokencomp.evaluation.environment import public_name
    from tokencomp.inputs.clock import file_times

    with file_times() as read:
        media = files.load(source)
    loaded, variants = _variants(source, media, files.question, settings_of)
    report = measure(public_name(source.model), loaded, variants, rounds, progress=not as_json)
    report["file"] = {f"{part}_cpu_s": seconds for part, seconds in read.items()}
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report)


def _variants(
    source: opt.Source, media: list[Any], question: str, settings_of: Settings
) -> tuple[Any, dict[Any, Any]]:
    """The model, and per setting its inputs and seconds of preprocessing, a median of three."""
    import functools
    import statistics

    from tokencomp.cli._showcase import prompt
    from tokencomp.evaluation.batches import Answerer
    from tokencomp.evaluation.timing import seconds
    from tokencomp.inputs.prompts import to_model

    model, processor = source.loaded
    answerer, row, variants = Answerer({"": model}, processor, {}), prompt(media, question), {}
    for setting in settings_of(model):
        prepare = functools.partial(answerer.inputs, [row], setting)
        inputs = to_model(prepare(), model)
        variants[setting] = inputs, statistics.median(seconds(prepare) for _ in range(3))
    return model, variants


def measure(
    name: str,
    model: Any,
    variants: dict[Any, tuple[dict[str, Any], float | None]],
    rounds: int,
    progress: bool,
) -> dict[str, Any]:
    """The report of one prompt under several settings; `name` of the model is for the title."""
    from tokencomp.evaluation.environment import environment
    from tokencomp.evaluation.profiler import profile

    rows = profile(model, variants, rounds=rounds, progress=progress)
    return {"model": name, **environment(), "file": None, "rows": rows}


def show(report: dict[str, Any]) -> None:
    """Print a report as a table."""
    from rich.console import Console

    from tokencomp.cli._tables import print_table
    from tokencomp.pages.html import compact, si
    from tokencomp.plan.counts import ratio_text

    console, rows = Console(), report["rows"]
    texts: dict[str, Callable[[Any], str]] = {
        "tokens": compact,
        "ms": lambda seconds: f"{1e3 * seconds:.1f} ms",
        "bytes": lambda count: si(count, "B"),
        "count": si,
    }
    for row in rows:
        for part in row["answers"]:
            text = f"{part['seconds']:.2f} s, {part['speedup']:.2f}×"
            row[f"answer_{part['tokens']}"] = text
    lines = [one for one in LINES if one[1] != "tower_ratio" or any(row[one[1]] for row in rows)]
    names = ["", *(name for name, _, _ in lines)]
    columns = [
        [
            f"{row['reducer']}\n{ratio_text(row['ratio']).replace(',', ', ')}",
            *("–" if row[key] is None else texts.get(f, f.format)(row[key]) for _, key, f in lines),
        ]
        for row in rows
    ]
    full, others = columns[0], columns[1:]
    for start in range(0, max(len(others), 1), BLOCK):  # the full model, and some settings
        block = [full, *others[start : start + BLOCK]]
        cells = list(zip(names, *block, strict=True))
        title = report["model"] if start == 0 else None
        heads = cells[0]
        print_table(console, heads, cells[1:], wrapped=heads, title=title, justify="right")
    if report["file"]:
        parts = (f"{name[:-6]} {1e3 * s:.1f} ms" for name, s in report["file"].items())
        console.print(f"Before the model, of CPU time: {', '.join(parts)}.")
    where = report["hardware"]
    device = ", ".join(where["gpus"]) or f"{where['cpu']}, {where['threads']} threads"
    console.print(
        f"[dim]{device}; variants interleaved in one process, medians. 2×: twice as fast. LLM: "
        "prefill with reducer; in all: vision tower included, preprocessing not. Answers: from "
        "preprocessing to the last token, with steps as long as the first ones.[/]"
    )
