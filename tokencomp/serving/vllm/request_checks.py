"""Checks of the body of a chat completion before vLLM sees it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_core import to_json

from tokencomp.method import Method
from tokencomp.serving import KEY
from tokencomp.serving.limits import Deadline, RequestError
from tokencomp.serving.media import check_media
from tokencomp.serving.request import AnyPart, Chat, Message, Part, read_request
from tokencomp.serving.spec import REQUEST_KEYS, ServerOptions
from tokencomp.serving.video import with_request
from tokencomp.serving.vllm import PIXELS
from tokencomp.serving.vllm.roles import check_sender
from tokencomp.serving.vllm.rules import Rules

DATA_URL = re.compile(r"\s*data:[\w.+-]+/[\w.+-]+[;,]", re.IGNORECASE)
MEDIA_TYPE = re.compile(r"image|video|audio|file|embeds")
FORM = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'


def misplaced(name: str) -> bool:
    """Whether a field has the name of a setting, or nearly the name of a field with settings."""
    near = difflib.get_close_matches(
        name, (KEY, "mm_processor_kwargs", "media_io_kwargs"), cutoff=0.8
    )
    return name == "extra_body" or name in REQUEST_KEYS or bool(near)


class VllmMessage(Message):
    """A message with the texts and calls of tools that vLLM reads."""

    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: Any = None


class VllmChat(Chat[VllmMessage]):
    """A chat completion, or a body of another path; further fields are vLLM's."""

    closed = False

    messages: list[VllmMessage] = Field(default_factory=list, fail_fast=True)

    def unserved(self, where: str = "") -> list[str]:
        """Unknown fields, and settings of tokencomp outside of their field, which vLLM ignores."""
        return super().unserved(where) + [name for name in self.further if misplaced(name)]

    @property
    def further(self) -> dict[str, Any]:
        """The fields that only vLLM reads."""
        return self.model_extra or {}


class NamedPart(Part):
    """A text, or a medium under the name that a router gives to it."""

    uuid: str | None = None


class Grid(AnyPart):
    """The grid of a medium that an encoder has encoded, and its name:

        {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 16, 22]}, "uuid": "..."}

    It has lists alone, as vLLM reads tensors from texts. `roles.check_grids` compares the numbers
    with those of the encoder; vLLM itself ends on negative ones.
    """

    type: Literal["image_embeds", "video_embeds"]
    image_embeds: dict[str, list[Any]] | None = None
    video_embeds: dict[str, list[Any]] | None = None
    uuid: str | None = None

    @field_validator("image_embeds", "video_embeds")
    @classmethod
    def _of_natural_numbers(cls, value: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
        for name, numbers in (value or {}).items():
            if name.endswith("_grid_thw") and not (
                len(numbers) == 3 and all(type(n) is int and n > 0 for n in numbers)
            ):
                raise ValueError(f"{name} needs three numbers from 1 on")
        return value


class RouterMessage(VllmMessage):
    """A message of a router, which may replace media by what an encoder has reported."""

    content: str | list[NamedPart | Grid] | None = None  # type: ignore[assignment]


class RouterRequest(VllmChat):
    """A request of a router."""

    messages: list[RouterMessage] = Field(default_factory=list)  # type: ignore[assignment]


@dataclass
class Checked:
    """A checked request, before its media are checked.

    `method` is None where the request has the server's; `by_load`: the load of the server chooses
    the ratio.
    """

    request: VllmChat
    method: Method | None
    by_load: bool

    def body(self, rules: Rules) -> bytes:
        """The JSON that vLLM gets, once the media are checked.

        Video files have equal parts of the pixels that other media leave. `frames.ChosenFrames`
        checks each against its part before it decodes the file.
        """
        request = self.request
        fields = request.model_dump(exclude_unset=True, exclude={"tokencomp"})
        deadline = Deadline(rules.limits.decode_seconds)
        left, files = check_media(request.media, rules.limits, deadline, rules.remote_media)
        given = request.media_io_kwargs or {}
        video = given.get("video") or {}
        # Video files are decoded later, in vLLM: each gets its part of the pixels that are left.
        if files and rules.chosen_frames and isinstance(video, dict):
            fields["media_io_kwargs"] = {**given, "video": {**video, PIXELS: left // files}}
        if self.method is not None:
            kwargs = request.mm_processor_kwargs or {}
            fields["mm_processor_kwargs"] = {**kwargs, KEY: self.method.plain}
        return to_json(fields)


def check_body(
    body: bytes | bytearray,
    rules: Rules,
    options: ServerOptions,
    ratio: float | None = None,
    chat: bool = True,
    router: bool = False,
) -> Checked:
    """Read a JSON body and check all of it but the media.

    `ratio`: under load, for requests with media that name none. Other paths than `chat` have media
    in messages of the same form, or none. A `router` may send transfer parameters, names of media,
    and grids of media without pixels.
    """
    request = read_request(RouterRequest if router else VllmChat, body, rules.limits)
    if not rules.media_options:
        with_request(request.media_io_kwargs, rules.limits)
    further = request.further
    check_sender(further, router)
    _check_sampling(further)
    if not chat:
        _check_no_media(request.model_dump(exclude={"messages"}))
    if request.media and further.get("truncate_prompt_tokens") is not None:
        raise RequestError("truncate_prompt_tokens would cut media. Leave it out.")
    method, by_load = request.method(options, "vllm", ratio)
    return Checked(request, None if method is options.default else method, by_load)


def _check_no_media(fields: dict[str, Any]) -> None:
    """Refuse media in a form of other paths, whose size nobody checks."""
    for value in _nested(fields):
        named = isinstance(value, dict) and MEDIA_TYPE.search(str(value.get("type")))
        if named or (isinstance(value, str) and DATA_URL.match(value)):
            raise RequestError(
                "media outside of chat messages: on this path only `messages` may have them, as "
                f"{FORM}."
            )


def _nested(value: Any) -> Iterator[Any]:
    # A loop instead of recursion: a client chooses the depth.
    waiting = [value]
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value


def _check_sampling(fields: dict[str, Any]) -> None:
    """Refuse a seed on a CPU, as vLLM has no way to read a prompt with a seed in several steps.

    Beams are refused too: vLLM runs each as a request that `usage.tokencomp` does not count.
    """
    if fields.get("use_beam_search"):
        raise RequestError("not served: use_beam_search. Leave it out.")
    if fields.get("seed") is not None and fields.get("temperature") != 0 and runs_on_cpu():
        raise RequestError(
            "seed: vLLM on a CPU cannot read a prompt with a seed in several steps, which many "
            "requests at once or n > 1 make necessary. Leave it out, or set temperature to 0."
        )


def runs_on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
