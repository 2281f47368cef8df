"""`tokencomp tune`: spend a token or time budget on frames, pixels, reducer and ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli import _parse as parse


@opt.flat
def command(
    method: opt.StageFlags,
    source: opt.Source,
    data: Annotated[
        Path, typer.Option(help="Your questions: JSON Lines with question, answer and media.")
    ],
    tokens: Annotated[
        float, typer.Option(min=1, help="Visual tokens per item and decoder layer, at most.")
    ],
    frames: Annotated[
        str, typer.Option(help="Frames per video to try, each as in `eval`.")
    ] = "4,8,16",
    scale: Annotated[
        str, typer.Option(help="Picture sides, or times of sounds, to try; original = 1.")
    ] = "1,0.75,0.5",
    reducer: opt.Reducers = "auto,uniform",
    ratio: Annotated[
        str, typer.Option("--ratio", help="Ratios in [0, 1) to try, separated by commas.")
    ] = "0.5,0.75,0.9",
    batch_size: opt.BatchSize = 8,
    max_new_tokens: opt.MaxNewTokens = 16,
    as_json: opt.Json = False,
) -> None:
    """Search frames × pixels × reducer × ratio for the best accuracy at a budget.

    Every combination within --tokens is measured. Prints the Pareto front of accuracy against
    tokens.
    """
    from tokencomp.inputs.video.frames import plain_frames

    grid: dict[str, Any] = {
        "frames": [plain_frames(one) for one in parse.names(frames)],
        "scales": _numbers("scale", scale),
        "reducers": parse.methods(reducer),
        "ratios": parse.numbers(parse.ratios(ratio), "tune"),
        "tokens": tokens,
        "options": method.stages,
    }
    from tokencomp.evaluation import tuning
    from tokencomp.evaluation.environment import environment
    from tokencomp.inputs.files import FileQuestions

    file = FileQuestions(data)
    loaded, questions = source.loaded, list(file)
    file.check_answers(loaded[1], max_new_tokens)
    candidates = tuning.candidates(*loaded, questions, **grid)
    how: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    measured = tuning.search(*loaded, questions, candidates, **how)
    within = tuning.within(measured, tokens)
    if as_json:
        facts = {"model": source.model, "tokens": tokens, "max_new_tokens": max_new_tokens}
        typer.echo(tuning.as_json(within, {**facts, **environment()}))
    else:
        _print(within, tuning.pareto(within), tokens)


def _numbers(name: str, text: str) -> list[float]:
    from tokencomp.errors import OptionError

    try:
        numbers = [float(part) for part in parse.names(text)]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise OptionError(f"--{name} {text!r}: expected positive numbers separated by commas.")
    return numbers


def _print(measured: list[Any], front: list[Any], tokens: float) -> None:
    from rich.console import Console

    from tokencomp.cli._tables import print_table

    console = Console()
    if not front:
        console.print(
            f"Nothing answered within {tokens:g} tokens; give a larger budget or fewer frames."
        )
        raise typer.Exit(1)
    names = ("frames", "scale", "method", "ratio", "tokens", "ms/answer", "accuracy", "n")
    rows = []
    for c in measured:
        choice = (str(c.frames), f"{c.scale:g}", c.setting.name, f"{c.setting.ratio:.3g}")
        result = (f"{c.tokens:.0f}", f"{1e3 * c.seconds:.0f}", f"{c.accuracy:.1%}", str(c.items))
        rows.append(("●" if c in front else "", *choice, *result))
    print_table(console, ("", *names), rows, gap=1)
    best = max(front, key=lambda c: c.accuracy)
    method = f"{best.setting.name} at {best.setting.ratio:.3g}"
    console.print(
        f"\n[green]●[/] Pareto front. Best: {best.frames} frames, scale {best.scale:g}, "
        f"{method}: {best.accuracy:.1%} with {best.tokens:.0f} tokens.\n"
        "[dim]It was chosen on these questions, so this accuracy is optimistic. Check it on "
        "held-out data.[/]"
    )
