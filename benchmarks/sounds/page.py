"""The page of this benchmark, from its result file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.accuracy.packed import PackedAnswers
from benchmarks.gpu.contribution import Row
from benchmarks.gpu.recompute import losing, runs_of, table_lines
from benchmarks.publishing import MARK, provenance
from benchmarks.real.page import families_table, methods_by_family
from benchmarks.sounds.choice import choice_lines
from benchmarks.stored import NOTE, read_stored
from recipes.sounds.model import TOKENS
from recipes.sounds.scenes import COUNTS, NAMES, SECONDS
from tokencomp.storage import write_text

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE / "README.md"
HEAD = f"""# Sounds

A tiny model that listens answers questions about clips of {SECONDS:.0f} seconds: which of
{len(NAMES)} kinds of sound are heard, how many, when, and in which order. It is a stock
`Qwen2AudioForConditionalGeneration` of transformers, trained from scratch on such clips; a clip
becomes {TOKENS} tokens, 25 per second as in the published model.

```bash
python -m recipes.sounds.build   # goes on where it stopped
python -m benchmarks.sounds.run  # makes this page
```

## What it can show, and what it cannot

- It can show what a method does to tokens that stand in one line of time, where most neighbours
  resemble each other and a short sound has three or four tokens.
- It cannot show what a method does to speech, or to a 7B model.
- A clip has {COUNTS[0]} to {COUNTS[1]} sounds of 0.15 to 1.3 seconds before faint noise. They
  never overlap.
- The answers are from one training with one seed.
- `downscale` plays the clip faster, and so higher: the model has never heard such clips.
- Other jobs ran beside the answers. The column of times is rough; those of FLOPs and KV are exact.
"""


def page(results: dict[str, Any]) -> str:
    """Markdown of a result file."""
    about, training = results["about"], results["training"]
    mark = "" if about.get(MARK, True) else " **Not for publication: uncommitted changes.**"
    stages = ", ".join(f"{name} {steps}" for name, steps in training["stages"].items())
    end = "The recipe ran to its end" if training["finished"] else "Training was stopped early"
    scores = ", ".join(f"{name} {value} %" for name, value in training["training_scores"].items())
    run = f"""
## This run

- Model: `{training["command"]}`; steps by stage: {stages}. {end}, after {training["seconds"]} s;
  {training["parameters"] / 1e6:.1f} M parameters; {provenance(training)}.
- Running shares of right answers on training clips at the end: {scores}. No clip repeats.
- Answers: {provenance(about)}.{mark}
- {results["per_family"]} questions of each family and split; greedy decoding in
  {results["identity"]["dtype"]}.
"""
    parts = [HEAD, run, NOTE, families_table(results), *choice_lines(results)]
    for split, note in (("validation", "choices are made on these"), ("test", "none is")):
        rows = [Row.model_validate(row) for row in results[split]["rows"]]
        runs = runs_of(rows, PackedAnswers.from_json(results[split]["answers"]))
        count = len(runs[0].records)
        parts += [f"\n## Methods, {count} {split} questions ({note})\n", *table_lines(runs)]
    return "\n".join([*parts, methods_by_family(results, runs), losing(runs)])


def write_page(results: Path, page_path: Path) -> Path:
    """Write the page; without a result file it says that there is none."""
    text = f"{HEAD}\nThere are no results yet.\n"
    if results.exists():
        text = page(read_stored(results))
    return write_text(page_path, text.rstrip() + "\n")
