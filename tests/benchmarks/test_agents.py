"""Counts of an agent's prompts, against a cache of single tokens."""

from __future__ import annotations

import pytest

from benchmarks.serving import agents


@pytest.mark.parametrize("name", agents.POLICIES)
def test_counts_equal_a_cache_of_single_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts as lists of tokens, in a smaller case; every token that is not cached counts."""
    monkeypatch.setattr(agents, "HEAD", 5)
    monkeypatch.setattr(agents, "TEXT", 3)
    monkeypatch.setattr(agents, "SCREEN", 40)
    policy, cached, total, every = agents.POLICIES[name], set(), 0, 0
    for step in range(12):
        tokens: list[object] = [("head", n) for n in range(5)]
        for i in range(step + 1):
            kept = int(40 * policy(step, i) + 0.5)
            tokens += [(i, kept, n) for n in range(kept)] + [(i, "text", n) for n in range(3)]
        prefixes = [tuple(tokens[: n + 1]) for n in range(len(tokens))]
        total += sum(prefix not in cached for prefix in prefixes)
        cached.update(prefixes)
        every += len(tokens)
    found = agents.count(policy, 12)
    assert (found["prefilled"], found["uncached"]) == (total, every)
