"""`tokencomp train`: the trained methods, each on any supported model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tokencomp.cli import _options as opt
from tokencomp.cli import _parse as parse

app = typer.Typer(
    help="Train a selector, an ADSC adapter, or a ccam projector.", no_args_is_help=True
)

Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="'shapesqa' (embedded; 'shapesqa:FAMILY,...' for some of it), a JSON Lines file, or a "
        "folder with questions.jsonl: one object with question, answer and media per line.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder; a killed run goes on there.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")]
Rate = Annotated[float, typer.Option("--learning-rate", help="Peak learning rate.")]


@dataclass(frozen=True)
class Shared(opt.Source):
    """Options of all methods that do not depend on the model."""

    data: Data = "shapesqa"
    kind: Annotated[
        str, typer.Option("--kind", help="Embedded questions: image, video or both.")
    ] = "both"
    samples: Annotated[int, typer.Option("--samples", min=1, help="Training questions.")] = 8000
    batch: Annotated[int, typer.Option("--batch", min=1, help="Questions at once.")] = 16
    evaluate: Annotated[
        int, typer.Option("--evaluate", min=0, help="Held-out questions answered at the end.")
    ] = 200
    frames: Annotated[int, typer.Option("--frames", min=1, help="Frames of a video.")] = 8
    seed: Annotated[int, typer.Option("--seed", help="Decides order and initial weights.")] = 0

    def config(self) -> dict[str, Any]:
        """The options that are fields of the training configuration."""
        others = ("model", "device", "dtype", "image_max_tokens", "data")
        return {k: v for k, v in vars(self).items() if k not in others}


options = opt.flat(model=inspect.Parameter.empty)


@app.command()
@options
def selector(
    output: Output,
    shared: Shared,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of the network.")] = 20,
    held_out: Annotated[
        int, typer.Option("--held-out", min=1, help="Held-out questions that are explained.")
    ] = 500,
    input: Annotated[
        str,
        typer.Option(
            "--input",
            help="What the network reads: 'attention' of the text, or 'features', for servers.",
        ),
    ] = "attention",
) -> None:
    """Explain answers, train the selector on it, evaluate, save (arXiv 2506.01097)."""
    from tokencomp.training.selector.train import SelectorConfig, train_selector

    own: dict[str, Any] = {"epochs": epochs, "held_out": held_out, "input": input}
    config = SelectorConfig(**own, **shared.config())
    path = train_selector(*shared.loaded, shared.data, output, config)
    use = ", input='features'" if input == "features" else ""
    _report(path.with_suffix(".json"), f"reducer='selector', weights='{output}'{use}")


@app.command()
@options
def adsc(
    output: Output,
    shared: Shared,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            help="Ratios of equally long phases, mild to harsh or harsh to mild; 'a|b' take turns.",
        ),
    ] = "0.8,0.67,0.5,0|0.5|0.67|0.8",
    reducer: Annotated[
        str, typer.Option("--reducer", "-r", help="In force while training.")
    ] = "adsc",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of LoRA.")] = 16,
    steps: Steps = 1000,
    learning_rate: Rate = 1e-3,
) -> None:
    """LoRA on the decoder while tokens are dropped between its layers (arXiv 2602.12618)."""
    from tokencomp.training.adsc import CARD, AdscConfig, train_adsc

    name, own = parse.one_method(reducer, "train adsc")
    phases = tuple(part.strip() for part in schedule.split(",") if part.strip())
    lora: dict[str, Any] = {"rank": rank, "alpha": 2 * rank}
    loop: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, **shared.config()}
    config = AdscConfig(schedule=phases, reducer=name, options=own, **lora, **loop)
    train_adsc(*shared.loaded, shared.data, output, config)
    _report(output / CARD, f"peft.PeftModel.from_pretrained(model, '{output}')")


@app.command()
@options
def ccam(
    output: Output,
    shared: Shared,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Tokens per media.")] = 32,
    align: Annotated[
        int, typer.Option("--align", min=0, help="First steps that only imitate pooled frames.")
    ] = 200,
    steps: Steps = 2000,
    learning_rate: Rate = 1e-3,
) -> None:
    """A projector to a fixed number of tokens, on the frozen model (arXiv 2408.14023)."""
    from tokencomp.training.ccam import CcamConfig, train_ccam

    own: dict[str, Any] = {"queries": queries, "align": align, "steps": steps}
    config = CcamConfig(learning_rate=learning_rate, **own, **shared.config())
    path = train_ccam(*shared.loaded, shared.data, output, config)
    _report(path.with_suffix(".json"), f"reducer='ccam', weights='{output}'")


def _report(card: Path, use: str) -> None:
    """A table of the held-out accuracy, where it was measured, and how to use the result."""
    import json

    from rich.console import Console

    from tokencomp.cli._tables import print_table, retained
    from tokencomp.evaluation.metrics import Retention

    console = Console()
    rows = json.loads(card.read_text()).get("accuracy") or []
    if rows:
        names, cells = ("method", "kind", "ratio", "accuracy", "retention"), []
        for row in rows:
            kept = row.get("retention")
            low, high = row.get("interval") or (0.0, 0.0)
            interval = None if kept is None else Retention(kept, low, high, items=0)
            ratio, accuracy = f"{row['ratio']:.2f}", f"{row['accuracy']:.1%}"
            cells.append((row["name"], row.get("kind", ""), ratio, accuracy, retained(interval)))
        print_table(console, names, cells, title="held-out questions")
    console.print(f"Saved {card.parent}. Use it: {use}", highlight=False, markup=False)
