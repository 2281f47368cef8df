"""A higher ratio under load: a server that compresses can shed work, where others shed requests."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokencomp.errors import OptionError
from tokencomp.plan.counts import check_ratio

MAX_STEPS = 3  # every ratio has separate entries in prefix and encoder caches
LEAST_TOKENS = 256  # of a step
BEGIN_SECONDS = 0.5  # after which a request counts that is not answered yet
CALM_SECONDS = 10.0  # of less than half of a step's tokens, after which the step ends
SHARE = 0.25  # of a step's tokens: what one client may add to the load that others find
NETWORK = 64  # bits of an IPv6 address that name a network, in which a client has all addresses
logger = logging.getLogger("tokencomp.serving")

FORM = re.compile(r"([0-9]*\.?[0-9]+):([0-9]+)")


class Step(NamedTuple):
    """From `tokens` on in unanswered requests, requests that name no ratio have this one."""

    ratio: float
    tokens: int


def parse_steps(text: Any, base: float) -> tuple[Step, ...]:
    """Read "0.75:4096,0.9:8192"; `base` is the ratio without load. Raises `OptionError`."""
    parts = [FORM.fullmatch(part.strip()) for part in str(text).split(",")]
    steps = [Step(check_ratio(float(p[1])), int(p[2])) for p in parts if p] if all(parts) else []
    every = [Step(base, LEAST_TOKENS - 1), *steps]
    pairs = zip(every, steps, strict=False)
    grows = all(a.ratio < b.ratio and a.tokens < b.tokens for a, b in pairs)
    if not steps or len(steps) > MAX_STEPS or not grows:
        raise OptionError(
            f"ratio_by_load={text!r}: expected up to {MAX_STEPS} steps RATIO:TOKENS with growing "
            f"ratios above that of the server ({base:g}) and growing numbers of unanswered visual "
            f"tokens from {LEAST_TOKENS} on, such as 0.75:4096,0.9:8192."
        )
    return tuple(steps)


def client_of(scope: Any) -> str:
    """The address of a client; of IPv6 the network, whose addresses one client can have all."""
    host = str((scope.get("client") or ("",))[0])
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a socket file, or a proxy's word
        return host
    if address.version == 4:
        return host
    return str(ipaddress.ip_network((int(address) >> NETWORK << NETWORK, NETWORK)))


@dataclass
class _Found:
    """The load that a client, or anybody, has found: the step in force, and when it was busy."""

    step: int = 0
    busy: float = 0.0  # when a request last found half of the tokens of the step


@dataclass
class _Client:
    """Unanswered requests of a client, as time of arrival and visual tokens."""

    work: dict[int, tuple[float, int]] = field(default_factory=dict)
    found: _Found = field(default_factory=_Found)

    def tokens(self, before: float) -> int:
        """Visual tokens of the requests that came before a time."""
        return sum(tokens for since, tokens in self.work.values() if since <= before)


class Load:
    """Chooses the ratio of every request by the visual tokens of unanswered requests.

    A request counts from `join`, which follows all checks, until `leave`, once it has been there
    for `BEGIN_SECONDS`. Requests that name a ratio, and texts, do not join. A client finds all of
    its tokens, and of each other client at most `SHARE` of a step's, so that no client alone takes
    the others to a step. A step ends when no request has found half of its tokens for
    `CALM_SECONDS`: a ratio that changes with every request would make caches useless.

        step 4096:  client A has 9000 unanswered tokens, B 300, C 200
        A finds 9000 + 300 + 200 = 9500 → the step's ratio
        B finds 300 + min(9000, 1024) + 200 = 1524 → the usual ratio
    """

    def __init__(self, steps: Sequence[Step], clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self._clock = steps, clock
        self._clients: dict[str, _Client] = {}
        self._anybody, self._last = _Found(), 0

    def ratio(self, client: str) -> float | None:
        """The ratio by load of a request that arrives now, None for the default."""
        if not self.steps:
            return None
        now = self._clock()
        step = self._update(self._anybody, "", now)
        if (known := self._clients.get(client)) is not None:
            step = max(step, self._update(known.found, client, now))
        return self.steps[step - 1].ratio if step else None

    def join(self, client: str, tokens: int) -> Callable[[], None]:
        """Count a request of `tokens` visual tokens before compression; return how it leaves."""
        if not self.steps or not tokens:
            return lambda: None
        now, number, self._last = self._clock(), self._last, self._last + 1
        # Forget clients without requests whose steps have ended, so that the table stays small.
        for name, other in list(self._clients.items()):  # whose steps have ended
            if not other.work and now - other.found.busy > MAX_STEPS * CALM_SECONDS:
                del self._clients[name]
        known = self._clients.setdefault(client, _Client())
        known.work[number] = now, tokens

        def leave() -> None:
            known.work.pop(number, None)
            if not (known.work or known.found.step) and self._clients.get(client) is known:
                del self._clients[client]

        return leave

    def look(self) -> int:
        now = self._clock()
        steps = [self._update(client.found, name, now) for name, client in self._clients.items()]
        return max([self._update(self._anybody, "", now), *steps])

    def _update(self, found: _Found, client: str, now: float) -> int:
        """Let steps begin and end for a client; "" for one that has no request here."""
        before = found.step
        depths = list(self._depths(client, now - BEGIN_SECONDS))
        # Example: steps 4096 and 8192, depths 5000 and 5500: the first is reached, the second is
        # not.
        reached = sum(d >= step.tokens for d, step in zip(depths, self.steps, strict=True))
        # Up at once; stay while half of the step's tokens are found; down by one per calm period.
        if reached >= before:
            found.step, found.busy = reached, now
        elif 2 * depths[before - 1] >= self.steps[before - 1].tokens:
            found.busy = now
        elif calm := int((now - found.busy) / CALM_SECONDS):
            found.step, found.busy = max(reached, before - calm), now
        if found.step != before:
            logger.info(
                "ratio by load: step %d for %s, %d visual tokens are unanswered",
                found.step, client or "all clients", depths[max(found.step, before) - 1],
            )  # fmt: skip
        return found.step

    def _depths(self, client: str, before: float) -> Iterator[float]:
        """Visual tokens that a client finds, for every step."""
        tokens = {name: known.tokens(before) for name, known in self._clients.items()}
        for step in self.steps:
            # Of others at most a quarter of the step: one client cannot take all others to it.
            most = SHARE * step.tokens
            yield sum(n if name == client else min(n, most) for name, n in tokens.items())
