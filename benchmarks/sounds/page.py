"""The page of this benchmark, from its result file alone."""

from __future__ import annotations

from typing import Any

from benchmarks.publishing import provenance
from benchmarks.real.page import families_table, overview, read_runs, records
from benchmarks.sounds.choice import choice_lines
from recipes.sounds.model import TOKENS
from recipes.sounds.scenes import COUNTS, NAMES, SECONDS

HEAD = f"""# What happens to sounds?

A tiny `Qwen2AudioForConditionalGeneration`, trained from scratch, answers questions about clips of
{SECONDS:.0f} seconds with {COUNTS[0]} to {COUNTS[1]} sounds of {len(NAMES)} kinds: which are
heard, how many, when, and in which order. A clip becomes {TOKENS} tokens, 25 per second.
"""
BELOW = """
## How to read this

Most neighbouring tokens resemble each other, and a short sound has three or four tokens. Nothing
carries over to speech or to a 7B model. One training with one seed. `downscale` plays the clip
faster, and so higher: the model has never heard such clips.

```bash
python -m recipes.sounds.build   # goes on where it stopped
python -m benchmarks.sounds.run  # makes this page
```
"""


def page(results: dict[str, Any]) -> str:
    """Markdown of a result file."""
    training = results["training"]
    stages = ", ".join(f"{name} {steps}" for name, steps in training["stages"].items())
    end = "to its end" if training["finished"] else "stopped early"
    run = f"""
## Runs

- Model: {provenance(training)}. Steps: {stages}, {end}, {training["seconds"]} s;
  {training["parameters"] / 1e6:.1f} M parameters.
- Answers: {results["per_family"]} questions of each family and split; greedy decoding in
  {results["identity"]["dtype"]}.
"""
    runs = read_runs(results["test"])
    asked = (
        f"\nRight answers to {len(runs[0].records)} test questions of the learned families. All "
        "methods, intervals, families, FLOPs and KV bytes: [test](../README.md#tables-as-csv), "
        "[validation](../README.md#tables-as-csv).\n"
    )
    choice = choice_lines(results)
    return "\n".join([HEAD, overview(runs), asked, families_table(results), *choice, run, BELOW])


def data(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the CSV files of both splits."""
    return {split: records(results[split]) for split in ("validation", "test")}
