"""What is passed on to vLLM: the operator's rules, and the methods of requests.

`Rules` reach the processes of vLLM through the environment. Methods go from the middleware to the
processor in the same process: the middleware resolves the options of a request, and writes the
whole method where the processor reads options. The processor finds the method by that text.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from tokencomp.method import Method
from tokencomp.serving import ENV_RULES
from tokencomp.serving.bind import Bind
from tokencomp.serving.limits import Limits
from tokencomp.serving.vllm.roles import ENV_ROUTER_KEY

MOST = 4096  # methods, more than requests that run or wait
_methods: dict[str, Method] = {}


@dataclass(frozen=True)
class Rules:
    """What the operator lets through.

    `remote_media`: vLLM may fetch media, which nobody checks. `media_options`: requests may set
    all of `media_io_kwargs`, with which a client can make vLLM decode every frame of a video.
    `chosen_frames`: vLLM loads videos with `frames.ChosenFrames`. `paths`: further paths of vLLM
    that answer; one that ends with "/" includes all below it. `router_key`: what a router sends
    with transfer parameters (`roles`); None: nobody may send them.
    """

    bind: Bind = field(default_factory=lambda: Bind(host=""))
    limits: Limits = field(default_factory=Limits)
    remote_media: bool = False
    media_options: bool = False
    chosen_frames: bool = True
    paths: tuple[str, ...] = ()
    router_key: str | None = None

    def as_json(self) -> str:
        """The value of the environment variable, without the keys, which have variables too."""
        open_ = replace(self, bind=replace(self.bind, api_key=None), router_key=None)
        return JSON.dump_json(open_).decode()

    @classmethod
    def from_environment(cls) -> Rules:
        """The rules of this process; without the variable, the strictest for any host."""
        rules = JSON.validate_json(os.environ.get(ENV_RULES) or "{}")
        bind = replace(rules.bind, api_key=os.environ.get("VLLM_API_KEY"))
        return replace(rules, bind=bind, router_key=os.environ.get(ENV_ROUTER_KEY) or None)


JSON = TypeAdapter(Rules)


def hand_on(method: Method) -> None:
    """Remember the method of a request. Called in one thread, `handed` in any."""
    text = json.dumps(method.plain, sort_keys=True)
    _methods.pop(text, None)
    _methods[text] = method
    while len(_methods) > MOST:
        del _methods[next(iter(_methods))]


def handed(text: str) -> Method | None:
    """The method of a request with these options, as JSON with sorted keys; None: resolve them."""
    return _methods.get(text)
