"""What the operator of a server lets requests do, on its way into the processes of vLLM."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from tokencomp.serving import ENV_RULES
from tokencomp.serving.hf.media import Limits


@dataclass(frozen=True)
class Rules:
    """What the operator lets through, beside the key.

    Attributes
    ----------
    hosts
        Address of the server, and further names of it, see `Bind`.
    media_path
        Directory that `file:` URLs must lie below; None refuses all of them.
    frames
        Number of frames of a video.
    remote_media
        Whether vLLM may fetch media. What it fetches is not checked.
    media_options
        Whether requests may set `media_io_kwargs`, with which a client can make vLLM decode every
        frame of a video.
    """

    hosts: tuple[str, ...] = ("",)
    media_path: str | None = None
    frames: int = Limits.frames
    remote_media: bool = False
    media_options: bool = False

    def as_json(self) -> str:
        """Return the value of the environment variable."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Rules:
        """Return the rules of this process; without the variable, the strictest for any host."""
        return cls(**json.loads(os.environ.get(ENV_RULES) or "{}"))
