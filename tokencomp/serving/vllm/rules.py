"""What the operator of a server allows, passed to the processes of vLLM."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tokencomp.serving import ENV_RULES
from tokencomp.serving.bind import Bind
from tokencomp.serving.limits import Limits


@dataclass(frozen=True)
class Rules:
    """What the operator lets through.

    `remote_media`: vLLM may fetch media, which nobody checks. `media_options`: requests may set
    all of `media_io_kwargs`, with which a client can make vLLM decode every frame of a video.
    `chosen_frames`: vLLM loads videos with `frames.ChosenFrames`. `paths`: further paths of vLLM
    that answer; one that ends with "/" includes all below it. `routers`: addresses and networks
    that may send transfer parameters (`roles`).
    """

    bind: Bind = field(default_factory=lambda: Bind(host=""))
    limits: Limits = field(default_factory=Limits)
    remote_media: bool = False
    media_options: bool = False
    chosen_frames: bool = True
    paths: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()

    def as_json(self) -> str:
        """Return the value of the environment variable, without the key, which vLLM has too."""
        return json.dumps(asdict(replace(self, bind=replace(self.bind, api_key=None))), default=str)

    @classmethod
    def from_environment(cls) -> Rules:
        """Return the rules of this process; without the variable, the strictest for any host."""
        values = json.loads(os.environ.get(ENV_RULES) or "{}")
        bind, limits = values.pop("bind", {"host": ""}), values.pop("limits", {})
        bind["api_key"] = os.environ.get("VLLM_API_KEY") or None
        if path := limits.get("allowed_path"):
            limits["allowed_path"] = Path(path)
        for name in ("paths", "routers"):
            values[name] = tuple(values.get(name, ()))
        return cls(Bind(**bind), Limits(**limits), **values)
