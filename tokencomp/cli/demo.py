"""`tokencomp demo`: see compression work, on the embedded model or on your own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli._methods import settings

SMALL = (
    "This is the time of a toy, which is too small to gain much: most of its time is not work on "
    "tokens. "
)


@opt.flat(reducer="random,auto", ratio="0.75")
def command(
    context: typer.Context,
    method: opt.MethodOptions,
    source: opt.Source,
    files: opt.Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML report.")] = Path(
        "tokencomp-demo.html"
    ),
) -> None:
    """Answer questions with and without compression; print a table and write an HTML report.

    Without files: the embedded model on the packaged samples, in about 20 seconds on two cores.
    With --image or --video: any supported model on your files. A picture of the kept patches (.png)
    lies beside the report.
    """
    settings_of = settings(context, method)
    if not (files.image or files.video):
        own = "give files to ask about with --image or --video"
        opt.refuse_options(context, ("question", "frames"), "the packaged questions", own)
    opt.check_output(output)
    from tokencomp.inputs.clock import file_times

    with file_times() as read:
        media = files.load(source)
    from rich.console import Console

    from tokencomp.cli import _demo as work
    from tokencomp.evaluation.environment import public_name
    from tokencomp.pages import demo as demo_page

    console = Console()
    say = lambda text: console.print(f"[dim]{text} …[/]")  # noqa: E731
    _needs_files(source.model, media)
    loaded, processor = source.load()
    chosen, called = settings_of(loaded), public_name(source.model)
    answered = (loaded, processor, called, chosen)
    if media:
        demo = work.demo_files(*answered, media, files.label, files.question, say)
        demo = dataclasses.replace(demo, file=read)
    else:
        ratios = {setting.ratio for setting in chosen}
        shown = 0.75 if 0.75 in ratios else max(ratios)
        demo = work.demo_embedded(*answered, shown, say)
    _print(console, demo)
    path = demo_page.write(demo, output)
    picture = output.with_suffix(".png")
    demo_page.kept_sheet(demo).save(picture)
    console.print(f"\nReport: [bold]{path}[/]. Kept patches: [bold]{picture}[/]")
    if not media:
        console.print(
            "More methods and ratios: tokencomp demo --reducer all --ratio 0.5,0.75,0.9. Questions "
            "of your own: tokencomp eval --data questions.jsonl"
        )


def _needs_files(model: str, media: list[Any]) -> None:
    from tokencomp.errors import OptionError
    from tokencomp.inputs.packaged import available_models, resolve

    resolve(model)
    known = available_models()
    if not media and Path(model).name not in known and not (Path(model) / "config.json").exists():
        raise OptionError(
            f"model {model!r} was not trained on ShapesQA: give it something to look at with "
            f"--image FILE or --video FILE, and --question. Embedded models need no files: "
            f"{', '.join(known) or 'none is installed'}."
        )


def _print(console: Any, demo: Any) -> None:
    from rich.markup import escape

    for sentence in filter(None, (demo.opening, *demo.sentences, demo.clock)):
        console.print(escape(sentence))
    console.print()
    console.print(_table(demo))
    _print_measured(console)
    for note in demo.moves:
        console.print(f"[dim]{escape(note)}[/]")
    for one in demo.questions:
        expected = "" if one.expected is None else f" [dim](right: {escape(one.expected)})[/]"
        console.print(f"\n[bold]{escape(one.question)}[/] [dim]{escape(one.name)}[/]{expected}")
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
    title = f"\nMeasured on real shapes: LLM prefill with {speed.reducer}, times as fast"
    shown = _tables.table("shape", "visual tokens", title=title)
    for ratio in speed.ratios:
        shown.add_column(f"at {ratio:g}", justify="right", no_wrap=True)
    for model, tokens, values in speed.rows:
        cells = ("–" if v is None else f"{v:.1f}×" for v in values)
        shown.add_row(model, f"{tokens}", *cells)
    shown.caption = speed.where
    console.print(shown)


def _table(demo: Any) -> Any:
    from tokencomp.cli import _tables
    from tokencomp.pages.html import compact, si
    from tokencomp.pages.measured import TOY

    accuracy = ("acc.", "retention") if demo.items else ()
    table = _tables.table("method", "ratio", "reached", *accuracy, gap=1)
    table.add_column("per layer", overflow="fold")
    for name in ("FLOPs", "KV", "as fast"):
        table.add_column(name, justify="right", no_wrap=True)
    full, last = demo.rows[0], ""
    for row in demo.rows:
        name = row.label
        cells = [name if name != last else "", f"{row.setting.shown_ratio}", f"{row.ratio:.3f}"]
        if demo.items:
            cells += [f"{row.accuracy:.1%}", _tables.retained(row.retention)]
        cells += [
            compact(row.per_layer),
            f"{row.flops / full.flops:.0%}",
            f"{row.kv_bytes / full.kv_bytes:.0%}",
            f"{1 / row.prefill_ratio:.2f}×",
        ]
        table.add_row(*cells)
        last = name
    flops, kv = si(full.flops, "FLOP"), si(full.kv_bytes, "B")
    table.caption = (
        f"Prefill of the full model: {flops}, {kv} of KV. as fast: the full model's LLM prefill "
        "time over this one's, interleaved, medians; 2× is twice as fast. "
        + (SMALL if demo.facts["parameters"] < TOY else "")
        + "per layer: k layers with n visual tokens are n×k."
    )
    return table
