"""Every reducer × ratio × packaged model on ShapesQA: run, tabulate, plot.

    python benchmarks/accuracy/run.py                       # test split → results/, README.md
    python benchmarks/accuracy/run.py --split validation    # for choosing (see choose.py)
    python benchmarks/accuracy/run.py --reducers condiv merge --ratios 0.9 --per-family 20

Every setting answers the same items, greedily, through real JPEG and mp4 files, the processor and
`generate`. `results/MODEL/SPLIT.jsonl` has one line per item with the answers of every setting,
`SPLIT.json` what they depend on; tables and plot are made from those files alone. A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tokencomp import available_reducers, make_reducer
from tokencomp.errors import TokenCompError
from tokencomp.evaluation.examples import shapesqa
from tokencomp.evaluation.runner import Run, sweep
from tokencomp.evaluation.settings import DOWNSCALE, Setting
from tokencomp.zoo import available_models, load
from tokencomp.zoo.questions import FAMILIES
from tokencomp.zoo.shapesqa import items

HERE = Path(__file__).parent
RATIOS = (0.5, 0.75, 0.9, 0.95)
BASELINES = ("random", "uniform", DOWNSCALE)
TOWERS = ("visual", "vision_tower", "vision_model")
LEFT_OUT = ("oracle", "ccam")  # one needs the answer, one always gives as many tokens
SHARED = ("date", "command", "versions", "commit", "hardware", "attention", "pixels", "batch_size")


def usable(model: Any, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Reducers that can run on `model`, and why the others cannot."""
    ready, refused = [], {}
    for name in names:
        try:
            make_reducer(name).for_model(model)
            ready.append(name)
        except TokenCompError as error:
            refused[name] = str(error)
    return ready, refused


def settings(names: Iterable[str], ratios: Iterable[float]) -> list[Setting]:
    """The full model, the baselines, then every named reducer, at every ratio."""
    names = [*BASELINES, *(n for n in names if n not in BASELINES)]
    return [Setting(), *(Setting(n, r) for n, r in itertools.product(names, ratios))]


@contextlib.contextmanager
def tower_once(model: torch.nn.Module) -> Iterator[None]:
    """Run the vision tower once per batch: its input is the same tensor under every setting."""
    tower = next(m for n, m in model.named_modules() if n.split(".")[-1] in TOWERS)
    run, last = tower.forward, []

    def forward(pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not last or last[0] is not pixels:
            last[:] = [pixels, run(pixels, *args, **kwargs)]
        return copy.copy(last[1])  # the caller writes into it

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def answer_all(
    name: str, split: str, wanted: list[Setting], args: argparse.Namespace, folder: Path
) -> None:
    """Ask one model everything, then write the compact results."""
    model, processor = load(name)
    asked = items(split, args.per_family, tuple(args.families))
    examples = shapesqa(asked, folder / "media" / split)
    where = folder / "runs" / name / split
    with tower_once(model):
        runs = sweep(model, processor, examples, wanted, where, batch_size=args.batch, name=name)
    write(runs, folder / name, split)


def write(runs: dict[Setting, Run], folder: Path, split: str) -> None:
    """One line per item with the prediction of every setting, and one manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for setting, run in runs.items():
        for r in run.answered:
            row = rows.setdefault(r["id"], {k: r[k] for k in ("id", "family", "prompt", "answer")})
            row.setdefault("predictions", {})[setting.label] = r["prediction"]
            row.setdefault("correct", {})[setting.label] = int(r["correct"])
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    (folder / f"{split}.jsonl").write_text("".join(lines))
    first = next(iter(runs.values())).manifest
    manifest = {
        "model": folder.name,
        "split": split,
        "items": len(rows),
        **{k: first[k] for k in SHARED if k in first},
        "settings": {
            s.label: {
                "reducer": s.reducer,
                "ratio": s.ratio,
                "options": s.options,
                "seconds": run.manifest["seconds"],
                **run.manifest["summary"],
            }
            for s, run in runs.items()
        },
    }
    (folder / f"{split}.json").write_text(json.dumps(manifest, indent=1) + "\n")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=available_models())
    parser.add_argument(
        "--reducers", nargs="+", default=None, help="default: all that can run at any ratio"
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--per-family", type=int, default=60)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def main() -> None:
    args = arguments().parse_args()
    torch.set_num_threads(args.threads)
    names = args.reducers or [n for n in available_reducers() if n not in LEFT_OUT]
    for name in args.models:
        ready, refused = usable(load(name)[0], names)
        for reducer, why in refused.items():
            print(f"{name}: left out {reducer}: {why}")
        wanted = settings(ready, args.ratios)
        answer_all(name, args.split, wanted, args, args.out)
    if args.split == "test":
        from report import write_report

        print(write_report(args.out, args.out.parent))


if __name__ == "__main__":
    main()
