"""`tokencomp demo`: see compression work, on the packaged pictures and clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli._methods import settings


@opt.flat(reducer="random,auto", ratio="0.75")
def command(
    context: typer.Context,
    method: opt.MethodOptions,
    source: opt.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML report.")] = Path(
        "tokencomp-demo.html"
    ),
) -> None:
    """Answer packaged questions with and without compression: a table and an HTML report.

    It takes about 20 seconds on two cores. With your own files and any supported model, `tokencomp
    inspect` shows answers and kept patches, and `tokencomp profile` time and memory.
    """
    settings_of = settings(context, method)
    from rich.console import Console

    from tokencomp.cli import _demo as work
    from tokencomp.evaluation.environment import public_name
    from tokencomp.pages import demo as demo_page

    console = Console()
    say = lambda text: console.print(f"[dim]{text} …[/]")  # noqa: E731
    loaded = source.loaded
    demo = work.make_demo(*loaded, public_name(source.model), settings_of(loaded[0]), say)
    _print(console, demo)
    path = demo_page.write(demo, output)
    console.print(
        f"\nReport: [bold]{path}[/]\n"
        "More methods and ratios: tokencomp demo --reducer all --ratio 0.5,0.75,0.9. A picture or "
        "clip of your own: tokencomp inspect --image FILE --question TEXT. Questions of your own: "
        "tokencomp eval --data questions.jsonl"
    )


def _print(console: Any, demo: Any) -> None:
    from rich.markup import escape

    from tokencomp.cli._tables import print_lines

    for sentence in (demo.opening, *demo.sentences):
        console.print(escape(sentence))
    console.print()
    print_lines(console, demo.table)
    console.print(f"\n[dim]{demo.choice}[/]")
    for one in demo.questions:
        expected = f"[dim](right: {escape(one.expected)})[/]"
        console.print(f"\n[bold]{escape(one.question)}[/] [dim]{escape(one.name)}[/] {expected}")
        for answer in one.answers:
            label = f"{answer.setting.name} {answer.setting.shown_ratio}"
            console.print(f"  {label:<18} {escape(answer.text)}")
