"""`tokencomp eval`: MLVU, MVBench and any other lmms-eval task, with honest baselines."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli._options import (
    Device,
    Dtype,
    Frames,
    Model,
    Ratios,
    Reducers,
    Set,
    check_reducers,
    names,
    ratios,
    reducer_options,
    settings_for,
)

BASELINES = ("random", "downscale")


def command(
    model: Model = "tiny-qwen2-vl",
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", help="lmms-eval tasks or groups, by commas.")
    ] = "mlvu_dev,mvbench",
    reducer: Reducers = "auto",
    ratio: Ratios = "0.5,0.75,0.9",
    options: Set = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Local copy in hub layout (owner/name folders), or 'shapesqa'."),
    ] = None,
    frames: Frames = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folders.")] = Path("runs"),
    baselines: Annotated[
        bool, typer.Option(help="Also run random dropping and equal-token downscaling.")
    ] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Run lmms-eval's tasks, prompts and scoring on the compressed model.

    The full model, random dropping and equal-token downscaling run, too. Kill it and run it
    again: finished answers are kept. `tokencomp report` makes a page of the run folders.
    """
    chosen = names(reducer)
    check_reducers(chosen)
    given = settings_for(chosen, ratios(ratio), reducer_options(options))
    settings = _with_baselines(given, ratios(ratio)) if baselines else given
    from rich.console import Console

    from tokencomp.evaluation.bench_data import local_data
    from tokencomp.evaluation.benchmarks import find_tasks, run_setting

    console = Console()
    with tempfile.TemporaryDirectory() as home:
        local = None if data is None else local_data(data)
        found = find_tasks(names(tasks), local, Path(home))
        from tokencomp.evaluation.loading import load_model

        loaded = load_model(model, device=device, dtype=dtype)
        told = {}
        for k, setting in enumerate(settings):
            console.print(f"[dim]{k + 1}/{len(settings)}[/] {setting.label}")
            told[setting] = run_setting(
                loaded,
                model,
                found,
                setting,
                output / setting.label,
                limit=limit,
                frames=frames,
                batch_size=batch_size,
            )
    _print(console, told)
    console.print(f"\nRun folders: [bold]{output}[/]. Next: tokencomp report {output}/*")


def _with_baselines(given: list[Any], at: list[float]) -> list[Any]:
    from tokencomp.evaluation.settings import grid

    return list(dict.fromkeys([*grid(BASELINES, at), *given]))


def _print(console: Any, told: dict[Any, dict[str, Any]]) -> None:
    from rich.table import Table

    found = {s: m for s, m in told.items() if m}
    if not found:
        return
    full = next(iter(found.values()))["summary"]["accuracy"]
    scores = [k for k in next(iter(found.values()))["scores"]]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("method", "ratio", "reached", "items", "accuracy", "retention"):
        table.add_column(name, no_wrap=True)
    if len(scores) <= 4:
        for name in scores:
            table.add_column(name, justify="right")
    for setting, manifest in found.items():
        summary = manifest["summary"]
        failed = f" ({summary['failed']} failed)" if summary["failed"] else ""
        cells = [
            setting.reducer,
            f"{setting.ratio:g}",
            f"{summary['achieved_ratio']:.3f}",
            f"{summary['items']}{failed}",
            f"{summary['accuracy']:.1%}",
            f"{summary['accuracy'] / full:.1%}" if full else "–",
        ]
        if len(scores) <= 4:
            cells += [_score(manifest["scores"].get(name, {})) for name in scores]
        table.add_row(*cells)
    console.print(table)


def _score(values: dict[str, float]) -> str:
    """lmms-eval's own number."""
    return ", ".join(f"{v:.1f}" for v in values.values()) or "–"
