"""The ratio of requests that name none, by the visual tokens of unanswered requests."""

from __future__ import annotations

import json
from types import SimpleNamespace
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
from tokencomp.serving.load import Load, Step, client_of, parse_steps
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm import middleware

STEPS = (Step(0.75, 1000), Step(0.9, 4000))


class Crowd:
    """A load under a clock that stands, and clients whose requests have been there for a while."""

    def __init__(self, *steps: Step) -> None:
        self.now = 0.0
        self.load, self.leave = Load(steps or STEPS, lambda: self.now), {}

    def has(self, at: float, **tokens: int) -> None:
        """Let clients have one request each of so many visual tokens, which is old, at a time."""
        self.now = max(at - 1, self.now)
        for name in tokens:
            self.leave.pop(name, lambda: None)()
            self.leave[name] = self.load.join(name, tokens[name])
        self.now = at


def test_steps_begin_with_the_tokens_of_one_client_and_end_after_a_calm() -> None:
    """Up at 1,000 and 4,000 tokens; down after 10 s in which no request found half as many."""
    crowd = Crowd()
    for at, tokens, ratio in (
        (1, 999, None), (2, 1000, 0.75), (3, 4000, 0.9), (4, 3999, 0.9), (23, 2000, 0.9),
        (32, 1999, 0.9), (33, 1999, 0.75), (42, 499, 0.75), (43, 499, None), (44, 4000, 0.9),
        (45, 2000, 0.9), (54, 1, 0.9), (55, 1, 0.75), (64, 1, 0.75), (65, 500, 0.75),
        (75, 499, None), (76, 4000, 0.9), (500, 1, None),  # two steps, as nobody asked for minutes
    ):  # fmt: skip
        crowd.has(at, a=tokens)
        assert crowd.load.ratio("a") == ratio, at


def test_a_request_counts_once_it_has_been_there_for_half_a_second() -> None:
    """So ten short answers after each other raise nothing, however many tokens they have."""
    crowd = Crowd()
    for i in range(100):
        leave = crowd.load.join("a", 5000)
        crowd.now = 8.0 * i + 0.4
        assert crowd.load.ratio("a") is None and crowd.load.look() == 0
        leave()
        crowd.now = 8.0 * (i + 1)
    leave = crowd.load.join("a", 5000)
    crowd.now += 0.5
    assert crowd.load.ratio("a") == 0.9
    leave()
    leave()
    crowd.now += 100
    assert crowd.load.ratio("a") is None


def test_one_client_does_not_decide_for_the_others() -> None:
    """It counts a quarter of a step for them, and all it has for itself."""
    crowd = Crowd()
    crowd.has(1, attacker=10**6, a=400)
    assert crowd.load.ratio("attacker") == 0.9
    assert crowd.load.ratio("a") is None and crowd.load.ratio("b") is None
    assert crowd.load.look() == 2
    crowd.has(3, a=750)  # 750 and a quarter of 1,000
    assert crowd.load.ratio("a") == 0.75 and crowd.load.ratio("b") is None
    crowd.has(5, c=250, d=250)  # four quarters
    assert crowd.load.ratio("b") == 0.75
    crowd.has(7, a=0, c=0, d=0)
    assert crowd.load.ratio("new") == 0.75  # the step ends after a calm, for newcomers too
    crowd.now += 10
    assert crowd.load.ratio("new") is None


def test_texts_and_cheap_pictures_weigh_what_they_are() -> None:
    crowd = Crowd()
    for i in range(1000):
        crowd.load.join("a", 0)
        if i < 249:
            crowd.load.join("b", 4)
    crowd.now = 9
    assert crowd.load.ratio("a") is crowd.load.ratio("b") is None


def test_clients_that_have_left_are_forgotten() -> None:
    crowd = Crowd()
    for i in range(100):
        crowd.has(2 * i + 1, **{f"client {i}": 4000})
        assert crowd.load.ratio(f"client {i}") == 0.9
        crowd.leave.popitem()[1]()
    assert len(crowd.load._clients) <= 17  # of the last 30 s, in which a step may end
    for _ in range(100):
        crowd.load.join("text", 0)
        crowd.load.join("small", 1)()
    assert not {"text", "small"} & crowd.load._clients.keys()


def test_addresses_of_one_client() -> None:
    """Who has an address of IPv6 has the others of its network."""
    pairs = [("192.0.2.1", "192.0.2.2", False), ("2001:db8::1", "2001:db8::2:1", True),
             ("2001:db8:0:1::1", "2001:db8::1", False)]  # fmt: skip
    for one, other, same in pairs:
        names = {client_of({"client": (host, 1)}) for host in (one, other)}
        assert (len(names) == 1) is same
    assert client_of({"client": None}) == client_of({}) == ""


def test_without_steps_the_load_changes_nothing() -> None:
    load = Load((), lambda: 0.0)
    load.join("a", 10**6)
    assert load.ratio("a") is None and load.look() == 0


@pytest.mark.parametrize("text", ["0.75:1000,0.9:4000", " 0.75:1000, .9:4000"])
def test_steps_are_read(text: str) -> None:
    assert parse_steps(text, 0.5) == STEPS
    assert ServerOptions.parse({"ratio": 0.5, "ratio_by_load": text}).ratio_by_load == STEPS


@pytest.mark.parametrize(
    "options",
    [
        *({"ratio_by_load": text} for text in (
            "", "0.75", "0.75:", ":900", "0.75:900;0.9:990", "a:900", "0.75:900.5", "0.75:0",
            "0.5:900", "0.4:900", "0.4:0,0.75:900", "0.75:900,0.9:900", "0.9:900,0.75:990",
            "0.75:-900", "0.5:0", "0.6:900,0.7:910,0.8:920,0.9:930", ["0.75:900"], 3,
            "0.75:8,0.9:16",  # a number of requests, as in earlier versions
        )),
        {"ratio_by_load": "0.75:900,1.5:990"}, {"ratio_by_load": "0.75:900", "max_ratio": 0.7},
    ],
)  # fmt: skip
def test_other_steps_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((OptionError, RatioError)):
        ServerOptions.parse({"ratio": 0.5, **options})
    with pytest.raises(OptionError):
        ServerOptions.parse({"budget": 64, "ratio_by_load": "0.75:900"})


STEP = {"ratio": 0.5, "ratio_by_load": "0.75:256,0.9:512", "low_detail_ratio": 0.6}
MEDIA, LOW = [part(image(1))], [part(image(1), detail="low")]
ASKED: list[Any] = [
    # ratio by load, content, options of the request, ratio of the answer, whether it counts
    (None, MEDIA, {}, 0.5, True), (0.75, MEDIA, {}, 0.75, True), (0.9, MEDIA, {}, 0.9, True),
    (0.9, MEDIA, {"ratio": 0.2}, 0.2, False), (0.9, MEDIA, {"budget": 8}, None, False),
    (0.9, MEDIA, {"reducer": "uniform"}, 0.9, True), (0.9, LOW, {}, 0.6, False),
    (0.9, ["a"], {}, 0.5, False),
    (0.9, MEDIA, {"ratio": {"image": 0.2}}, {"image": 0.2}, False),
]  # fmt: skip


@pytest.mark.parametrize(("load", "parts", "asked", "wanted", "counts"), ASKED)
@pytest.mark.parametrize("engine", ["hf", "hf, fixed", "vllm"])
def test_a_request_keeps_the_ratio_that_it_names(
    engine: str, load: Any, parts: Any, asked: Any, wanted: Any, counts: bool, monkeypatch: Any
) -> None:
    """Then low detail, the load, the default. Only where the load may choose, a request counts."""
    if engine == "hf, fixed" and asked:
        return
    joined: list[int] = []
    seen: list[Any] = []
    stand_in = SimpleNamespace(
        ratio=lambda client: load, join=lambda client, n: joined.append(n) or (lambda: None)
    )
    for module in (server, middleware):
        monkeypatch.setattr(module, "Load", lambda steps: stand_in)

    def submit(*jobs: Any) -> None:
        seen.append(jobs[0].prompt.spec.requested)
        raise RequestError("reached", REACHED)

    async def engine_of_vllm(scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        seen.append(body.get("mm_processor_kwargs", {}).get("tokencomp"))
        joined.extend([1] * middleware.EXCHANGE.get().by_load)
        raise RequestError("reached", REACHED)

    options = {**STEP, "per_request": engine != "hf, fixed"}
    if engine == "vllm":
        app: Any = doors.vllm(app=engine_of_vllm, options=STEP)
    else:
        app = build_app(doors.engine(options, submit=submit), "tiny", Limits())
    body = user(*parts, **({"tokencomp": asked} if asked else {}))
    assert ask(app, body).status == REACHED
    got = seen.pop() or {"ratio": 0.5}  # vLLM has the default of the server
    assert asked.items() <= got.items() if wanted is None else got["ratio"] == wanted
    assert len(joined) == counts
