"""Looking for running calls on the stacks of other threads."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
from torch import nn

from tokencomp.engine.call.gate import threads_in


class Waiting(nn.Module):
    """Its forward runs until it may end."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.end = threading.Event(), threading.Event()

    def forward(self) -> None:
        self.begun.set()
        self.end.wait(30)


def test_threads_that_run_a_module_are_found() -> None:
    model, other = Waiting(), Waiting()
    thread = threading.Thread(target=model)
    thread.start()
    try:
        assert model.begun.wait(30)
        assert threads_in([other, model]) == {thread.ident}
        assert threads_in([other]) == set()
    finally:
        model.end.set()
        thread.join()
    assert threads_in([model]) == set()


@pytest.mark.parametrize("on", [True, False])
def test_no_garbage_is_collected_while_frames_are_read(
    on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 waits forever if a finalizer wants the lock that reading frames holds."""
    real, seen = sys._current_frames, []
    monkeypatch.setattr(sys, "_current_frames", lambda: seen.append(gc.isenabled()) or real())
    before = gc.isenabled()
    try:
        gc.enable() if on else gc.disable()
        threads_in([nn.Identity()])
        assert seen == [False] and gc.isenabled() is on
    finally:
        gc.enable() if before else gc.disable()
