"""`tokencomp inspect`: which patches and frames survive, and what becomes of the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli._methods import settings

PAGES, PICTURES = (".html", ".htm"), (".png", ".jpg", ".jpeg")


@opt.flat(ratio="0.75")
def command(
    context: typer.Context,
    method: opt.MethodOptions,
    source: opt.Source,
    files: opt.Files,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="HTML page; a .png or .jpg name gives a picture.")
    ] = Path("tokencomp-inspect.html"),
    max_new_tokens: opt.MaxNewTokens = 64,
    boxes: Annotated[
        Path | None,
        typer.Option(
            "--boxes",
            help="Boxes of the words on the picture, from any OCR program: rows of x1,y1,…,x4,y4,"
            "text, or JSON. Shows which share of them keeps at least half of its cells.",
        ),
    ] = None,
) -> None:
    """Show which patches and frames each reducer keeps, per stage, and the answers.

    A patch is as bright as the share of decoder layers that see it.
    """
    from tokencomp.errors import OptionError

    settings_of = settings(context, method)
    if output.suffix.lower() not in (*PAGES, *PICTURES):
        allowed = ", ".join((*PAGES, *PICTURES))
        raise OptionError(f"--output {output}: the name must end in one of {allowed}.")
    media = files.load(source)
    words = _boxes(boxes, files)
    from rich.console import Console
    from rich.markup import escape

    from tokencomp.cli._showcase import answer_prompt, prompt
    from tokencomp.pages.html import compact

    loaded, processor = source.loaded
    chosen, question = settings_of(loaded), files.question
    row = prompt(media, question)
    answers = answer_prompt(loaded, processor, row, chosen, max_new_tokens, words)
    console = Console()
    for sampling in (m.sampling for m in media if getattr(m, "sampling", None)):
        times = ", ".join(f"{t:.1f}" for t in sampling.seconds or sampling.indices)
        unit = "s" if sampling.seconds else "(numbers)"
        console.print(f"[dim]frames by {escape(sampling.rule)}: {times} {unit}[/]")
    for a in answers:
        name = f"{a.setting.name} {a.setting.shown_ratio}"
        tokens = f"visual tokens: {compact(a.cost.per_layer)}"
        if a.words is not None:
            tokens += f"; {a.words:.1%} of {len(words)} words"
        console.print(f"[bold]{name:<18}[/] [dim]{tokens}[/]\n  {escape(a.text)}")
    for sentence in (compared(a, answers[0]) for a in answers[1:]):
        console.print(f"\n{escape(sentence)}")
    _write(answers, question, files.label, loaded, source.model, output)
    console.print(f"\nPictures: [bold]{output}[/]")


def _boxes(path: Path | None, files: opt.Files) -> list[Any]:
    """The boxes of a file, none without one; they belong to the only picture."""
    from tokencomp.errors import OptionError
    from tokencomp.evaluation.coverage import load_boxes

    if path is None:
        return []
    if len(files.image or ()) != 1 or files.video:
        raise OptionError("--boxes needs exactly one --image, and no --video.")
    return load_boxes(path)


def compared(answer: Any, full: Any) -> str:
    """What one setting kept, its cost, and whether the answer is unchanged."""
    from tokencomp.pages.demo import saved

    same = answer.text.strip() == full.text.strip()
    change = "stays the same" if same else "differs from that of the full model"
    return f"{saved(answer.setting, [answer.cost], [full.cost])} The answer {change}."


def _write(
    answers: list[Any], question: str, label: str, loaded: Any, model: str, output: Path
) -> None:
    from tokencomp.cli._demo import model_facts
    from tokencomp.evaluation.environment import public_name
    from tokencomp.pages.html import render
    from tokencomp.pages.pictures import of_one_size, strip

    if output.suffix.lower() in PICTURES:
        sheets = of_one_size([p for a in answers for p in a.pictures])
        sheet = strip(sheets, columns=max(1, 1400 // sheets[0].width))
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output)
        return
    name = public_name(model)
    render(
        "inspect.html",
        output,
        title=f"What {name} sees",
        question=question,
        label=label,
        answers=answers,
        sentences=[compared(a, answers[0]) for a in answers[1:]],
        facts=model_facts(loaded),
    )
