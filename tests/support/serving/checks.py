"""Comparison of an engine's results with the patched Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch

from support.serving import hf_reference

POSITIONS = {"llava_onevision": "compact", "internvl": "compact"}


def check(
    results: dict,
    jobs: list[dict],
    folder: Any,
    model: str,
    suffix: str = "",
    reference: Any = None,
) -> None:
    """Require equal tokens and prompt lengths, and log-probabilities within 1e-3.

    `reference` is a function of folder and job, by default the patched model.
    """
    for job in jobs:
        got = results[job["name"] + suffix]
        if reference is not None:
            want = reference(folder, job)
        else:
            want = hf_reference.answer(folder, job, POSITIONS.get(model, "original"))
        assert "error" not in got, (job["name"], got)
        assert got["prompt"] == want["prompt"], job["name"]
        assert got["tokens"] == want["tokens"], job["name"]
        torch.testing.assert_close(
            torch.tensor(got["logprobs"]), torch.tensor(want["logprobs"]), atol=1e-3, rtol=0
        )


def batch(jobs: list[dict], suffix: str) -> list[dict]:
    """Return the jobs with a suffix, to be submitted together with empty caches."""
    return [{**job, "name": job["name"] + suffix, "reset": True} for job in jobs]
