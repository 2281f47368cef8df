"""What a server computes for an agent, by when it compresses screenshots: counts, no timing.

    python -m benchmarks.serving.agents            # agents.json and agents.md beside this file
    python -m benchmarks.serving.agents --report   # only the page

At every step the prompt has all earlier screenshots. The prefix cache is perfect: it keeps every
prompt, and a new one reuses its longest beginning that any of them has had. Beside it stand the
counts without any cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import publishing
from benchmarks.experiment import Experiment
from tokencomp.plan.plan import keep_count

STEPS, HEAD, TEXT = 40, 1500, 200
SCREEN = 60 * 34  # visual tokens of 1920 × 1080 pixels in Qwen3-VL: 32 × 32 pixels each
Block = tuple[str, int]
Policy = Callable[[int, int], float]


POLICIES: dict[str, Policy] = {
    "all screenshots whole": lambda step, i: 1.0,
    "the last 3 whole, older ones removed": lambda step, i: float(step - i < 3),
    "halved with every step of age, down to 0.1": lambda step, i: max(0.1, 0.5 ** (step - i)),
    "the newest whole, older ones at 0.1": lambda step, i: 1.0 if i == step else 0.1,
    "**every one at 0.25 from first sight**": lambda step, i: 0.25,
    "0.5 at first sight, 0.1 in batches of 8": lambda step, i: 0.1 if i < step // 8 * 8 else 0.5,
}
"""By step and number of a screenshot: the fraction of its tokens in the prompt of that step."""


def prompt(policy: Policy, step: int) -> list[Block]:
    """Blocks of a prompt: what identifies them for a cache, and their tokens."""
    blocks: list[Block] = [("system prompt", HEAD)]
    for i in range(step + 1):
        tokens = keep_count(SCREEN, policy(step, i))
        blocks += [(f"screenshot {i}: {tokens}", tokens), (f"text {i}", TEXT)]
    return blocks


def shared(a: list[Block], b: list[Block]) -> int:
    """Tokens of the longest common beginning."""
    total = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        total += one[1]
    return total


def count(policy: Policy, steps: int = STEPS) -> dict[str, int]:
    """Tokens prefilled in all steps, with and without a cache; the mean and the longest prompt."""
    seen: list[list[Block]] = []
    prefilled, lengths = 0, []
    for step in range(steps):
        blocks = prompt(policy, step)
        lengths.append(sum(tokens for _, tokens in blocks))
        prefilled += lengths[-1] - max((shared(blocks, old) for old in seen), default=0)
        seen.append(blocks)
    whole = {"uncached": sum(lengths), "mean": sum(lengths) // steps, "longest": max(lengths)}
    return {"prefilled": prefilled, **whole}


def table(report: dict[str, Any]) -> str:
    """The counts as Markdown."""
    head = ("screenshots", "prefilled, cached", "prefilled, no cache", "mean prompt", "longest")
    keys = ("prefilled", "uncached", "mean", "longest")
    rows = [[row["policy"], *(f"{row[key]:,}" for key in keys)] for row in report["rows"]]
    return publishing.table(head, rows, right=4)


def page(report: dict[str, Any]) -> str:
    """Everything as a Markdown page."""
    case = (
        f"{report['steps']} steps of an agent. Every prompt has the system prompt ({HEAD:,} "
        f"tokens) and, for every step so far, a screenshot ({SCREEN:,} visual tokens) and {TEXT} "
        "tokens of text. Numbers in the first column are kept fractions of a screenshot. The "
        "others are counts of tokens, not times: the prefix cache is perfect, or there is none. "
        "[Compression for agents](../../docs/agents.md) says what follows. "
        "[All benchmark pages](../README.md)."
    )
    parts = ["# When should an agent compress its screenshots?", case, table(report)]
    return "\n\n".join(parts)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Counts of all policies."""
    yield {"steps": STEPS, "rows": [{"policy": n, **count(p)} for n, p in POLICIES.items()]}


EXPERIMENT = Experiment("serving/agents", measure, page)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
