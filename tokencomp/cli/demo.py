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

    With your files and any supported model, `tokencomp inspect` shows answers and kept patches, and
    `tokencomp profile` time and memory.
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
        f"\nPictures of what was kept: [bold]{path}[/]\n"
        "All methods: tokencomp demo --reducer all --ratio 0.5,0.75,0.9\n"
        "Your file: tokencomp inspect --image FILE --question TEXT\n"
        "Your questions, with intervals: tokencomp eval --data questions.jsonl"
    )


def _print(console: Any, demo: Any) -> None:
    from rich.markup import escape

    from tokencomp.cli._tables import print_table
    from tokencomp.pages.demo import COLUMNS

    console.print()
    print_table(console, COLUMNS, demo.rows, justify="right")
    console.print(f"\n{escape(demo.price)}")
    for one in demo.questions:
        expected = f"[dim](right: {escape(one.expected)})[/]"
        console.print(f"\n[bold]{escape(one.question)}[/] [dim]{escape(one.name)}[/] {expected}")
        for answer in one.answers:
            setting = answer.setting
            label = setting.name if setting.off else f"{setting.name} {setting.shown_ratio}"
            console.print(f"  {label:<18} {escape(answer.text)}")
