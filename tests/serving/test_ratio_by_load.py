"""The ratio of requests that name none, by the number of requests that wait for an answer."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("starlette")
from support.serving import doors
from support.serving.doors import REACHED, ask, part, user
from support.serving.files import image

from tokencomp.errors import OptionError, RatioError
from tokencomp.serving.hf import app as server
from tokencomp.serving.hf.app import build_app
from tokencomp.serving.limits import Limits, RequestError
from tokencomp.serving.load import Load, Step, parse_steps
from tokencomp.serving.spec import ServerOptions

STEPS = (Step(0.75, 8), Step(0.9, 16))


def test_steps_begin_at_once_and_end_one_by_one_after_a_calm() -> None:
    """Up at 8 and 16 requests; down after 10 s in which no request found half as many."""
    now = 0.0
    load = Load(STEPS, lambda: now)
    for at, depth, ratio in (
        (0, 0, None), (1, 7, None), (2, 8, 0.75), (3, 30, 0.9), (4, 15, 0.9),
        (20, 8, 0.9),  # half of 16 is no calm
        (29, 7, 0.9), (30, 7, 0.75), (39, 3, 0.75), (40, 3, None), (41, 7, None), (42, 16, 0.9),
        (43, 8, 0.9), (52, 5, 0.9), (53, 9, 0.9), (62, 7, 0.9), (63, 4, 0.75), (72, 4, 0.75),
        (82, 4, 0.75),  # half of 8
        (83, 16, 0.9), (500, 0, None),  # two steps at once, as nobody asked for minutes
    ):  # fmt: skip
        now, load.depth = float(at), depth
        assert load.join() == ratio, at
        assert load.depth == depth + 1


def test_without_steps_the_load_changes_nothing() -> None:
    load = Load(())
    assert [load.join() for _ in range(100)] == [None] * 100
    load.leave()
    assert load.depth == 99 and load.look() == 0


@pytest.mark.parametrize("text", ["0.75:8,0.9:16", " 0.75:8, .9:16"])
def test_steps_are_read(text: str) -> None:
    assert parse_steps(text, 0.5) == STEPS
    assert ServerOptions.parse({"ratio": 0.5, "ratio_by_load": text}).ratio_by_load == STEPS


@pytest.mark.parametrize(
    "options",
    [
        *({"ratio_by_load": text} for text in (
            "", "0.75", "0.75:", ":8", "0.75:8;0.9:16", "a:8", "0.75:8.5", "0.75:0", "0.5:8",
            "0.4:8", "0.4:0,0.75:8", "0.75:8,0.9:8", "0.9:8,0.75:16", "0.75:-8", "0.5:0",
            "0.6:1,0.7:2,0.8:3,0.9:4", ["0.75:8"], 3,
        )),
        {"ratio_by_load": "0.75:8,1.5:16"}, {"ratio_by_load": "0.75:8", "max_ratio": 0.7},
    ],
)  # fmt: skip
def test_other_steps_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((OptionError, RatioError)):
        ServerOptions.parse({"ratio": 0.5, **options})
    with pytest.raises(OptionError):
        ServerOptions.parse({"budget": 64, "ratio_by_load": "0.75:8"})


def test_on_transformers_a_request_keeps_the_ratio_that_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where requests cannot name one (--fixed)."""
    specs: list[Any] = []

    def submit(*jobs: Any) -> None:
        specs.append(jobs[0].prompt.spec)
        raise RequestError("reached", REACHED)

    steps = {"ratio": 0.5, "ratio_by_load": "0.75:1,0.9:2", "low_detail_ratio": 0.6}
    for options, depth, more, wanted in (
        (steps, 0, {}, {"ratio": 0.5}), (steps, 1, {}, {"ratio": 0.75}),
        (steps, 2, {}, {"ratio": 0.9}), (steps, 2, {"ratio": 0.2}, {"ratio": 0.2}),
        (steps, 2, {"budget": 8}, {"budget": 8}),
        (steps, 2, {"reducer": "uniform"}, {"ratio": 0.9}), (steps, 2, "low", {"ratio": 0.6}),
        ({**steps, "per_request": False}, 2, {}, {"ratio": 0.9}),
    ):  # fmt: skip
        engine = doors.engine(options, submit=submit)
        load = Load(engine.options.ratio_by_load)
        monkeypatch.setattr(server, "Load", lambda steps, load=load: load)
        app, load.depth = build_app(engine, "tiny", Limits()), depth
        body = user(part(image(1), **({"detail": "low"} if more == "low" else {})))
        if isinstance(more, dict) and more:
            body["tokencomp"] = more
        assert ask(app, body).status == REACHED, depth
        assert specs[-1].requested == wanted and load.depth == depth
