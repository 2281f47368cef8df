"""The parts of a file's time add up, and none is counted twice."""

from __future__ import annotations

import pytest

from tokencomp.inputs import clock
from tokencomp.inputs.clock import file_times, part


def test_inner_parts_do_not_count_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock.time, "process_time", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    with file_times() as parts, part("decode"):
        work(1)
        with part("resize"):
            work(10)
            with part("select"):
                work(100)
        work(2)
        with part("resize"):
            work(20)
    assert parts == {"open": 0, "select": 100, "decode": 3, "resize": 30}
    with part("open"):  # outside of `file_times` nothing is counted
        work(1)
    assert parts["open"] == 0
