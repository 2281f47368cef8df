"""`tokencomp eval`: your own questions, or any task of lmms-eval, with baselines."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli._methods import settings


@opt.flat
def command(
    context: typer.Context,
    method: opt.MethodOptions,
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
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only this many items per task or file.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Your questions: a .jsonl file, one object with question, answer (or facts) "
            "and media per line. Or for tasks: a local copy in hub layout (owner/name folders), or "
            "'shapesqa'."
        ),
    ] = None,
    frames: opt.Frames = "8",
    batch_size: opt.BatchSize = 8,
    max_new_tokens: opt.MaxNewTokens = 16,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folders.")] = Path("runs"),
    baselines: Annotated[
        bool,
        typer.Option(help="Also run random and uniform dropping and equal-token downscaling."),
    ] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the baseline random.")] = 3,
) -> None:
    """Answer questions with and without compression, and compare the answers with baselines.

    Your own questions: --data questions.jsonl, where a line is {"question": "What colour is the
    car?", "answer": "red", "media": "car.jpg"}; an answer is right if it has the same words, or
    names the same option (A to H). {"facts": ["a red cup", "two forks"]} in place of the answer
    scores the share of the facts that a longer answer has. Without such a file: tasks, prompts and
    scoring of lmms-eval.

    The full model, random and uniform dropping and equal-token downscaling run, too. Kill it and
    run it again: finished answers are kept. `tokencomp report` makes a page of the run folders.

    Several processes share the items: `accelerate launch -m tokencomp eval …` on GPUs,
    `torchrun --nproc-per-node N -m tokencomp eval …` anywhere.
    """
    settings_of = settings(context, method)
    from tokencomp.inputs.video.frames import plain_frames

    chosen_frames = plain_frames(frames)
    from rich.console import Console

    from tokencomp.cli._eval import questions_in, run_questions, run_tasks, tasks_in
    from tokencomp.cli._tables import print_lines
    from tokencomp.evaluation.baselines import has_budget
    from tokencomp.evaluation.environment import process_rank
    from tokencomp.pages import report

    console = Console(quiet=process_rank()[0] > 0)  # one process speaks for all
    questions = questions_in(data, limit)
    name, where, fix = "max_new_tokens", "tasks", "every task has its own limit"
    if questions is not None:
        name, where, fix = "tasks", f"--data {data}", "leave it out, or leave out the file"
    opt.refuse_options(context, (name,), where, fix)
    with tempfile.TemporaryDirectory() as home:
        found = [] if questions else tasks_in(tasks, data, limit, Path(home), console)
        loaded = source.loaded
        if questions is not None:
            questions.check_answers(loaded[1], max_new_tokens)
        chosen = settings_of(loaded[0])
        if baselines:
            chosen = _with_baselines(chosen, seeds, has_budget(loaded[1]))
        folders = {setting: output / setting.label for setting in chosen}
        how: dict[str, Any] = {"frames": chosen_frames, "batch_size": batch_size}
        if questions is not None:
            how["max_new_tokens"] = max_new_tokens
            runs = run_questions(loaded, source.model, questions, folders, **how)
        else:
            runs = run_tasks(loaded, source.model, found, folders, console, limit=limit, **how)
    if not console.quiet:
        print_lines(console, report.lines(runs))
    _check_answers(runs)
    console.print(f"\nRun folders: [bold]{output}[/]. Next: tokencomp report {output}")


def _with_baselines(settings: list[Any], seeds: int, native: str | None = None) -> list[Any]:
    """The full model, the baselines at the same ratios, then the requested settings."""
    from tokencomp.evaluation.settings import DOWNSCALE, NATIVE, RANDOM, UNIFORM, grid, seeded

    at = [s.requested for s in settings if not s.off]
    ratios: list[Any] = [asked["ratio"] for asked in at if "ratio" in asked]
    numbers = [r for r in ratios if isinstance(r, float)]  # all that an input baseline takes
    budgets = [asked["budget"] for asked in at if "budget" in asked]
    small = grid([DOWNSCALE, NATIVE] if native else [DOWNSCALE], numbers)
    same = {name: grid([name], ratios, budgets) for name in (RANDOM, UNIFORM)}
    random = seeded(same[RANDOM], seeds)
    return list(dict.fromkeys([*random, *same[UNIFORM], *small, *settings]))


def _check_answers(runs: list[Any]) -> None:
    """Raise `OptionError` if a setting could not answer anything, so that the command fails."""
    from tokencomp.errors import OptionError

    for run in runs:
        if run.records and not run.answered:
            raise OptionError(
                f"{run.path.name}: no question could be answered. The first one: "
                f"{run.records[0]['error']}"
            )
