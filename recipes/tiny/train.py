"""`python -m recipes.tiny.train tiny-qwen2-vl`: train, export, measure and write the card.

Killing the command loses at most the steps since the last checkpoint: start it again with the same
arguments and it goes on.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from recipes.tiny.stage import Stage

app = typer.Typer(add_completion=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="Tiny model to train, e.g. tiny-qwen2-vl.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/NAME-SEED.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that render batches.")] = 1,
    scale: Annotated[float, typer.Option(help="Factor on all step counts, for trials.")] = 1.0,
    items: Annotated[int, typer.Option(min=1, help="Test items per question family.")] = 200,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16.")] = False,
    start: Annotated[
        str | None, typer.Option(help="Model to start from, name or folder; default the recipe's.")
    ] = None,
    from_stage: Annotated[
        str | None,
        typer.Option(help="Train from this stage of the recipe on, at the weights of --start."),
    ] = None,
) -> None:
    """Train one tiny model and write a complete model folder to OUT/NAME."""
    import torch

    from tokencomp.errors import TokenCompError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if threads:
        torch.set_num_threads(threads)
    out = Path("runs") / f"{name}-{seed}" if out is None else out
    command = f"python -m recipes.tiny.train {name} --seed {seed}"
    if scale != 1.0:
        command += f" --scale {scale}"
    command += " --bf16" if bf16 else ""
    command += f" --from-stage {from_stage}" if from_stage else ""
    try:
        folder = run(name, out, seed, workers, scale, items, command, start, bf16, from_stage)
    except TokenCompError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{folder}: model, processor, metrics.json and README.md")


def run(
    name: str,
    out: Path,
    seed: int,
    workers: int,
    scale: float,
    items: int,
    command: str,
    start: str | None = None,
    bf16: bool = False,
    from_stage: str | None = None,
) -> Path:
    """Train (or go on), export to `out/name` and measure. Returns the model folder."""
    import torch

    from recipes.tiny.export import export
    from recipes.tiny.families import family
    from recipes.tiny.recipes import RECIPES, WARM_STARTS, shorten
    from recipes.tiny.tokenizer import load_tokenizer
    from recipes.tiny.trainer import TinyTrainer
    from tokencomp.storage import write_json

    arch = family(name)
    stages = stages_from(shorten(RECIPES[name], scale), from_stage)
    # Before anything is written, so that a wrong name leaves no folder behind.
    before = finished(start or name) if from_stage else {"steps": 0, "seconds": 0.0}
    arch.write_tokenizer(out / "tokenizer")
    trainer = TinyTrainer(
        arch, load_tokenizer(out / "tokenizer"), stages, out, seed, workers, bf16=bf16
    )
    if (trainer.phase, trainer.step) == (0, 0):
        if from_stage:
            copy_weights(trainer.model, start or name)
        elif name in WARM_STARTS:
            warm_start(trainer.model, name, WARM_STARTS[name], start)
    trainer.run()
    folder = export(trainer.model, arch, out / name)
    training = {
        "command": command,
        "seed": seed,
        "steps": before["steps"] + sum(stage.steps for stage in stages),
        "seconds": before["seconds"] + trainer.seconds,
        "cores": torch.get_num_threads(),
    }
    write_json(folder / "metrics.json", measure(name, folder, items, training))
    return write_report(folder)


def stages_from(stages: tuple[Stage, ...], name: str | None) -> tuple[Stage, ...]:
    """The stages from the one that is named on; all without a name."""
    from tokencomp.errors import UnknownNameError

    names = [stage.name for stage in stages]
    if name is not None and name not in names:
        raise UnknownNameError(f"The recipe has no stage {name!r}. Choose one of {names}.")
    return stages[names.index(name) if name else 0 :]


def finished(model: str) -> dict[str, Any]:
    """What the training of an embedded model, a name or a folder, took: `steps`, `seconds`."""
    from tokencomp.errors import CheckpointError
    from tokencomp.inputs.packaged import resolve

    metrics = Path(resolve(model)) / "metrics.json"
    if not metrics.exists():
        raise CheckpointError(
            f"{model} has no metrics.json, so it is no finished training of this command. Give its "
            "output folder, or the name of a packaged model, with --start."
        )
    training = json.loads(metrics.read_text())["training"]
    return {key: training[key] for key in ("steps", "seconds")}


def copy_weights(model: Any, source: str) -> None:
    """Copy all weights of `source`, a name or a folder, into a model of the same shape."""
    from tokencomp.errors import CheckpointError
    from tokencomp.inputs.loading import load_folder
    from tokencomp.inputs.packaged import resolve

    try:
        model.load_state_dict(load_folder(resolve(source))[0].state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"The weights of {source} do not fit: {error}.") from error


def warm_start(model: Any, name: str, other: str, folder: str | Path | None = None) -> None:
    """Copy the parts that a tiny model shares with `other`: decoder, head, tower.

    Parameters
    ----------
    model
        A new model of the family `name`.
    other : str
        The tiny model to start from.
    folder : str or Path, optional
        Where it lies; default the packaged one.

    Raises
    ------
    CheckpointError
        `other` is not packaged, or of another shape; the message says how to get it.
    """
    from recipes.tiny.families import family
    from tokencomp.errors import CheckpointError
    from tokencomp.inputs.loading import load_folder
    from tokencomp.inputs.packaged import available_models, resolve

    if folder is None and other not in available_models():
        raise CheckpointError(
            f"{name} starts from {other}, which is not packaged yet. Train it first: "
            f"python -m recipes.tiny.train {other}; then pass --start runs/{other}-0/{other}."
        )
    source, _ = load_folder(resolve(folder or other))
    parts, theirs = family(name).parts(model), family(other).parts(source)
    for part in [part for part in parts if part in theirs]:
        state = theirs[part].state_dict()
        fit_positions(state, parts[part].state_dict())
        try:
            parts[part].load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"The {part} of {folder or other} does not fit {name}: {error}. Start from {other}."
            ) from error


def fit_positions(state: dict[str, Any], target: dict[str, Any]) -> None:
    """Interpolate a tower's position table (side², width) in `state` to the side in `target`."""
    from torch.nn.functional import interpolate

    for name, table in state.items():
        if name.endswith("position_embedding.weight") and len(table) != len(target[name]):
            old, new = (round(len(t) ** 0.5) for t in (table, target[name]))
            grid = table.T.reshape(1, -1, old, old)
            grid = interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
            state[name] = grid.flatten(2)[0].T


def measure(name: str, folder: Path, items: int, training: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of the exported folder on the test split, with the facts for the card."""
    import torch
    import transformers

    from recipes.tiny.evaluate import blind_guess, by_family, evaluate
    from recipes.tiny.families import family
    from recipes.tiny.recipes import RECIPES
    from tokencomp.inputs.loading import load_folder
    from tokencomp.zoo.shapesqa.examples import FORMS
    from tokencomp.zoo.shapesqa.items import items as sample
    from tokencomp.zoo.shapesqa.layouts import write_media
    from tokencomp.zoo.shapesqa.questions import IMAGE_FAMILIES, VIDEO_FAMILIES

    arch = family(name)
    model, processor = load_folder(str(folder))
    sources = [source for stage in RECIPES[name] for _, source in stage.sources]
    reading = ("reading",) if any(source.text for source in sources) else ()
    videos = (*VIDEO_FAMILIES, "video_existence") if "video" in arch.kinds else ()
    every = (*IMAGE_FAMILIES, *reading, *videos)
    with tempfile.TemporaryDirectory() as media:
        test = [write_media(one, Path(media)) for one in sample("test", items, every)]
        results = {form: by_family(evaluate(model, processor, test, form)) for form in FORMS}
    learned = {source.scene for source in sources} | {"usual"}
    longest = max((frames for source in sources for frames in source.lengths), default=LONGEST)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "model": _facts(name, arch, model),
        "training": {**training, **versions},
        "test": results,
        "blind": blind_guess(test),
        "other_shapes": [
            *_other_scenes(model, processor, items, arch.kinds, learned, reading, longest)
        ],
    }


def _other_scenes(
    model: Any,
    processor: Any,
    items: int,
    kinds: Collection[str],
    learned: Collection[str],
    reading: Collection[str],
    longest: int,
) -> Iterator[dict[str, Any]]:
    """Accuracy on the `OTHER_SCENES` whose kind, difficulty, text and length the recipe has."""
    from recipes.tiny.evaluate import evaluate
    from tokencomp.zoo.shapesqa.items import FRAMES
    from tokencomp.zoo.shapesqa.items import items as sample

    for what, kind, families, scenes in OTHER_SCENES:
        if kind not in kinds or scenes.get("difficulty", "usual") not in learned:
            continue
        if scenes.get("frames", FRAMES) > longest:
            continue
        if "reading" in families and not reading:
            continue
        count = items if len(families) == 1 else max(1, items // 4)
        chosen = sample("test", count, families, **scenes)
        rows = evaluate(model, processor, chosen, "free", scenes.get("frames", FRAMES))
        right = sum(row["correct"] for row in rows)
        yield {"what": what, "accuracy": right / len(rows), "items": len(rows)}


def _facts(name: str, arch: Any, model: Any) -> dict[str, Any]:
    """Sizes of the model for its card."""
    config = arch.language_config(model)
    seen = [row for row in SEEN if row[0] in arch.kinds]
    return {
        "name": name,
        "architecture": type(model).__name__.removesuffix("ForConditionalGeneration"),
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "vision": sum(p.numel() for p in arch.vision_parameters(model)) / 1e6,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "tokens": ", ".join(
            text.format(arch.tokens_per(kind, shape)) for kind, shape, text, _ in seen
        ),
        "trained_on": "; ".join(sizes for *_, sizes in seen),
        **arch.card,
    }


SEEN = (
    ("image", (1, 224, 224), "{} per 224×224 image", "images of 168 to 280 px a side"),
    ("video", (8, 224, 224), "{} per video of 8 such frames", "videos of 8, 12 and 16 frames"),
)
LONGEST = 16
"""Frames of the longest clips of a recipe that says no more."""
BASIC = ("attribute", "existence", "count", "position")
# What else the card measures: name, kind, families, and arguments of `items`. Drawings and hard
# scenes are left out for models whose recipe has none.
OTHER_SCENES: tuple[tuple[str, str, tuple[str, ...], dict[str, Any]], ...] = (
    ("280×280 images", "image", BASIC, {"size": (280, 280)}),
    ("drawings in flat colours, any size", "image", BASIC, {"difficulty": "plain"}),
    ("hard images", "image", BASIC, {"difficulty": "hard"}),
    ("counting in crowds of 4 to 9 objects", "image", ("count",), {"difficulty": "hard"}),
    ("reading over textures in vivid colours", "image", ("reading",), {"difficulty": "hard"}),
    ("16-frame videos", "video", ("needle", "order", "direction"), {"frames": 16}),
    ("hard videos", "video", ("needle", "order", "direction"), {"difficulty": "hard"}),
    ("needles in 64-frame videos", "video", ("needle",), {"frames": 64}),
    ("order in 64-frame videos", "video", ("order",), {"frames": 64}),
    ("direction in 64-frame videos", "video", ("direction",), {"frames": 64}),
    ("repeated acts in 64-frame videos", "video", ("action_count",), {"frames": 64}),
)


def write_report(folder: Path) -> Path:
    """Write README.md from metrics.json."""
    from recipes.tiny.card import write_card

    write_card(folder, json.loads((folder / "metrics.json").read_text()))
    return folder


if __name__ == "__main__":
    app()
