"""Cells that several tables of the command line share."""

from __future__ import annotations

from tokencomp.evaluation.metrics import Retention


def retained(retention: Retention | None) -> str:
    """Retention with its interval, e.g. "97.1% [94%, 99%]"; a dash where there is none."""
    if retention is None or retention.value != retention.value:
        return "–"
    return f"{retention.value:.1%} [{retention.low:.0%}, {retention.high:.0%}]"
