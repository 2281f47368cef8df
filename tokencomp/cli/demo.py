"""`tokencomp demo`: see compression work, on the packaged pictures and clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli._methods import settings
from tokencomp.errors import OptionError

SMALL = (
    "This is the time of a toy, which is too small to gain much: most of its time is not work on "
    "tokens. "
)


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

    It takes about 20 seconds on two cores. A picture of the kept patches (.png) lies beside the
    report. With your own files and any supported model, `tokencomp inspect` shows answers and kept
    patches, and `tokencomp profile` time and memory.
    """
    settings_of = settings(context, method)
    if (picture := output.with_suffix(".png")) == output:
        raise OptionError(f"--output {output}: name a page, such as {output.with_suffix('.html')}.")
    opt.check_output(output)
    _check_trained(source.model)
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
    demo_page.kept_sheet(demo).save(picture)
    console.print(
        f"\nReport: [bold]{path}[/]. Kept patches: [bold]{picture}[/]\n"
        "More methods and ratios: tokencomp demo --reducer all --ratio 0.5,0.75,0.9. A picture or "
        "clip of your own: tokencomp inspect --image FILE --question TEXT. Questions of your own: "
        "tokencomp eval --data questions.jsonl"
    )


def _check_trained(model: str) -> None:
    """Refuse models that know nothing of the packaged questions."""
    from tokencomp.errors import OptionError
    from tokencomp.inputs.packaged import available_models, resolve

    resolve(model)
    known = available_models()
    if Path(model).name not in known and not (Path(model) / "config.json").exists():
        raise OptionError(
            f"model {model!r} was not trained on ShapesQA, which the demo asks: ask it about files "
            "of your own with tokencomp inspect --image FILE or --video FILE. Embedded models are: "
            f"{', '.join(known) or 'none is installed'}."
        )


def _print(console: Any, demo: Any) -> None:
    from rich.markup import escape

    for sentence in (demo.opening, *demo.sentences):
        console.print(escape(sentence))
    console.print()
    console.print(_table(demo))
    _print_measured(console)
    for note in demo.moves:
        console.print(f"[dim]{escape(note)}[/]")
    console.print(f"\n[dim]{demo.choice}[/]")
    for one in demo.questions:
        expected = f"[dim](right: {escape(one.expected)})[/]"
        console.print(f"\n[bold]{escape(one.question)}[/] [dim]{escape(one.name)}[/] {expected}")
        for answer in one.answers:
            label = f"{answer.setting.name} {answer.setting.shown_ratio}"
            console.print(f"  {label:<18} {escape(answer.text)}")


def _print_measured(console: Any) -> None:
    """What was measured on the shapes of real models, where this copy has the results."""
    from tokencomp.cli import _tables
    from tokencomp.pages.measured import prefill_speed

    speed = prefill_speed()
    if speed is None:
        console.print(
            "[dim]Times of real shapes: benchmarks/models/prefill.md in the repository.[/]"
        )
        return
    title = "\nMeasured on real shapes: LLM prefill, times as fast"
    shown = _tables.table("shape", "media", "tokens", "method", title=title)
    for ratio in speed.ratios:
        shown.add_column(f"at {ratio:g}", justify="right", no_wrap=True)
    for model, kind, tokens, method, values in speed.rows:
        cells = ("–" if v is None else f"{v:.1f}×" for v in values)
        shown.add_row(model, kind, f"{tokens}", method, *cells)
    shown.caption = speed.where
    console.print(shown)


def _table(demo: Any) -> Any:
    from tokencomp.cli import _tables
    from tokencomp.pages.html import compact, si
    from tokencomp.pages.measured import TOY

    table = _tables.table("method", "ratio", "reached", "acc.", "retention", gap=1)
    table.add_column("per layer", overflow="fold")
    for name in ("FLOPs", "KV", "as fast"):
        table.add_column(name, justify="right", no_wrap=True)
    full, last = demo.rows[0], ""
    for row in demo.rows:
        name = row.label
        table.add_row(
            name if name != last else "",
            row.setting.shown_ratio,
            f"{row.ratio:.3f}",
            f"{row.accuracy:.1%}",
            _tables.retained(row.retention),
            compact(row.per_layer),
            f"{row.flops / full.flops:.0%}",
            f"{row.kv_bytes / full.kv_bytes:.0%}",
            f"{1 / row.prefill_ratio:.2f}×",
        )
        last = name
    flops, kv = si(full.flops, "FLOP"), si(full.kv_bytes, "B")
    table.caption = (
        f"Prefill of the full model: {flops}, {kv} of KV. as fast: the full model's LLM prefill "
        "time over this one's, interleaved, medians; 2× is twice as fast. "
        + (SMALL if demo.facts["parameters"] < TOY else "")
        + "per layer: k layers with n visual tokens are n×k."
    )
    return table
