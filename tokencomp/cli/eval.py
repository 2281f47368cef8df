"""`tokencomp eval`: MLVU, MVBench and any other lmms-eval task, with baselines."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli import _parse as parse
from tokencomp.cli._methods import settings

TASKS = "mlvu_dev,mvbench"
COLUMNS = 6


@opt.flat
def command(
    context: typer.Context,
    method: opt.Method,
    source: opt.Source,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            "-t",
            help="lmms-eval tasks or groups, by commas. Default: mlvu_dev,mvbench; with --data "
            "shapesqa also the one-word task shapesqa.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Local copy in hub layout (owner/name folders), or 'shapesqa'."),
    ] = None,
    frames: opt.Frames = 8,
    batch_size: opt.BatchSize = 8,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folders.")] = Path("runs"),
    baselines: Annotated[
        bool, typer.Option(help="Also run random dropping and equal-token downscaling.")
    ] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the baseline random.")] = 3,
) -> None:
    """Run lmms-eval's tasks, prompts and scoring on the compressed model.

    The full model, random dropping and equal-token downscaling run, too. Kill it and run it
    again: finished answers are kept. `tokencomp report` makes a page of the run folders.

    Several processes share the items: `accelerate launch -m tokencomp.cli eval …` on GPUs,
    `torchrun --nproc-per-node N -m tokencomp.cli eval …` anywhere.
    """
    settings_of = settings(context, method)
    from rich.console import Console

    from tokencomp.lmms.data import PER_TASK, SHAPESQA, local_data
    from tokencomp.lmms.tasks import find_tasks, run_setting

    names = tasks or (f"{SHAPESQA},{TASKS}" if data == SHAPESQA else TASKS)
    console = Console(quiet=int(os.environ.get("RANK", 0)) > 0)  # one process speaks for all
    with tempfile.TemporaryDirectory() as home:
        local = None if data is None else local_data(data, per_task=max(limit or 0, PER_TASK))
        single_tasks = find_tasks(parse.names(names), local, Path(home))
        from tokencomp.evaluation.native import has_budget

        loaded = source.load()
        chosen, manifests = settings_of(loaded[0]), {}
        if baselines:
            chosen = _with_baselines(chosen, seeds, has_budget(loaded[1]))
        how: dict[str, Any] = {"limit": limit, "frames": frames, "batch_size": batch_size}
        how["full"] = next((output / s.label for s in chosen if s.off), None)
        for k, setting in enumerate(chosen):
            console.print(f"[dim]{k + 1}/{len(chosen)}[/] {setting.label}")
            out = output / setting.label
            manifests[setting] = run_setting(
                loaded, source.model, single_tasks, setting, out, **how
            )
    if not console.quiet:
        _print(console, manifests, [output / setting.label for setting in chosen])
    console.print(f"\nRun folders: [bold]{output}[/]. Next: tokencomp report {output}/*")


def _with_baselines(settings: list[Any], seeds: int, native: bool = False) -> list[Any]:
    """The full model, the baselines at the same ratios, then the requested settings."""
    from tokencomp.evaluation.settings import DOWNSCALE, NATIVE, RANDOM, Setting, grid

    at: list[Any] = [s.ratios or s.ratio for s in settings if not s.off]
    numbers = [
        ratio for ratio in at if isinstance(ratio, float)
    ]  # all that an input baseline takes
    more = [Setting(RANDOM, r, {"seed": k}) for k in range(1, seeds) for r in at]
    small = grid([DOWNSCALE, NATIVE] if native else [DOWNSCALE], numbers)
    return list(dict.fromkeys([*grid([RANDOM], at), *more, *small, *settings]))


def _print(console: Any, manifests: dict[Any, dict[str, Any]], folders: list[Path]) -> None:
    from tokencomp.cli._tables import print_lines
    from tokencomp.evaluation.runs import find_runs
    from tokencomp.pages import report

    manifests = {s: m for s, m in manifests.items() if m}
    if not manifests:
        return
    print_lines(console, report.lines(find_runs(folders)))
    if len(manifests) <= COLUMNS:
        _print_scores(console, manifests)


def _print_scores(console: Any, manifests: dict[Any, dict[str, Any]]) -> None:
    """lmms-eval's own scores, one row per task; `tokencomp report` has them for all settings."""
    from tokencomp.cli import _tables

    table = _tables.table("task", title="\nlmms-eval's scores", overflow="fold")
    for setting in manifests:
        label = setting.name if setting.off else f"{setting.name}\n{setting.shown_ratio}"
        table.add_column(label, justify="right")
    first = next(iter(manifests.values()))
    for task in first["identity"]["tasks"]:
        scores = [m["scores"].get(task, {}).values() for m in manifests.values()]
        table.add_row(task, *[", ".join(f"{v:.3g}" for v in values) or "–" for values in scores])
    console.print(table)
