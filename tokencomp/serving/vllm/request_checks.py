"""Checks of the body of a chat completion before vLLM sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokencomp.errors import OptionError, RatioError
from tokencomp.serving import KEY, ignored
from tokencomp.serving.limits import (
    FORMS,
    Deadline,
    Limits,
    RequestError,
    check_form,
    check_structure,
)  # fmt: skip
from tokencomp.serving.media import (
    FRAME_LIST,
    check_image,
    decode_base64,
    read_url,
)
from tokencomp.serving.spec import ServerOptions, as_mapping, names_amount, with_ratio
from tokencomp.serving.video import with_request
from tokencomp.serving.vllm import PIXELS
from tokencomp.serving.vllm.roles import check_sender
from tokencomp.serving.vllm.rules import Rules

MEDIA = ("image_url", "video_url")
GRIDS = ("image_embeds", "video_embeds")  # of a router: what an encoder has encoded
TEXTS = ("text", "refusal")
MESSAGE = ("role", "content", "name", "reasoning", "reasoning_content", "refusal", "tool_call_id")
DATA_URL = re.compile(r"\s*data:[\w.+-]+/[\w.+-]+[;,]", re.IGNORECASE)
MEDIA_TYPE = re.compile(r"image|video|audio|file|embeds")
FORM = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'


@dataclass
class Request:
    """A chat completion: what vLLM gets, its JSON object, and type and URL object of all media.

    `by_load`: the load of the server chooses the ratio.
    """

    body: bytes
    fields: dict[str, Any]
    media: list[tuple[str, dict[str, Any]]]
    by_load: bool = False

    def set(self, name: str, value: dict[str, Any]) -> None:
        """Set a field of the body that vLLM gets."""
        self.fields[name] = value
        self.write()

    def write(self) -> None:
        """Let vLLM get the fields as they are now."""
        self.body = as_json(self.fields).encode()


def read_request(
    body: bytes,
    rules: Rules,
    options: ServerOptions,
    ratio: float | None = None,
    chat: bool = True,
    router: bool = False,
) -> Request:
    """Read a JSON body and check all of it but the media.

    `ratio` is that of requests with media that name none, if the server is under load. Other
    paths than `chat` have media in messages of the same form, or none; some have no body. A
    `router` may send transfer parameters, names of media, and grids of media without pixels.
    """
    if not (chat or body):
        return Request(body, {}, [])
    check_structure(body)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({type(error).__name__}).") from None
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object.")
    if not rules.media_options:
        with_request(fields.get("media_io_kwargs"), rules.limits)
    check_sender(fields, router)
    _check_text(fields)
    _check_sampling(fields)
    for name in FORMS:
        check_form(name, as_json(fields.get(name)))
    messages = _messages(fields)
    changed = [_take_ignored(message) for message in messages]
    for message in messages:
        _check_fields(message)
    media = [part for message in messages for part in _media(message, router)]
    if not chat:
        _check_no_media({name: v for name, v in fields.items() if name != "messages"})
    if len(media) > rules.limits.max_items:
        raise RequestError(f"more than {rules.limits.max_items} images and videos.", 413)
    if media and fields.get("truncate_prompt_tokens") is not None:
        raise RequestError("truncate_prompt_tokens would cut media. Leave it out.")
    request = Request(body, fields, media)
    if any(changed):
        request.write()
    try:
        _set_options(request, options, ratio)
    except (OptionError, RatioError) as error:
        raise RequestError(str(error)) from None
    return request


def check_media(request: Request, rules: Rules) -> None:
    """Check media without decoding pixels; all media share one limit of pixels.

    Video files share what images and lists of frames leave, in equal parts; `frames.ChosenFrames`
    checks each against its part before it decodes the file.
    """
    limits = rules.limits
    deadline, left, files = Deadline(limits.decode_seconds), limits.max_total_pixels, 0
    for kind, value in request.media:
        url = value["url"]
        remote = rules.remote_media and url[:4].lower() == "http"
        pixels = (
            0 if remote else _pixels(kind, url, replace(limits, max_total_pixels=left), deadline)
        )
        files += kind == "video_url" and not pixels
        left -= pixels
    given = request.fields.get("media_io_kwargs") or {}
    video = given.get("video") or {} if isinstance(given, dict) else None
    if files and rules.chosen_frames and isinstance(video, dict):
        video = {**video, PIXELS: left // files}
        request.set("media_io_kwargs", {**given, "video": video})


def as_json(value: Any) -> str:
    """JSON of a value that was read from a body."""
    try:
        return json.dumps(value)
    except RecursionError:  # `json.loads` reads a little deeper than it writes
        raise RequestError("the body is nested too deeply.") from None


def _take_ignored(message: dict[str, Any]) -> bool:
    """Remove what changes no answer from a message; return whether there was something."""
    content = message.get("content")
    parts = [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []
    urls = [part[kind] for part in parts for kind in MEDIA if isinstance(part.get(kind), dict)]
    found: list[tuple[dict[str, Any], tuple[str, ...]]] = [(message, ignored.MESSAGE)]
    found += [(part, ignored.PART) for part in parts] + [(url, ignored.URL) for url in urls]
    taken = [values.pop(name) for values, names in found for name in names if name in values]
    return bool(taken)


def _messages(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages."""
    messages = request.get("messages") or []
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RequestError("messages must be a list of objects.")
    return messages


def _check_fields(message: dict[str, Any]) -> None:
    """Refuse a message with fields that are not known."""
    for name, value in message.items():
        text = name in MESSAGE and (isinstance(value, str) or name == "content")
        if value and not text and name != "tool_calls":
            raise RequestError(
                f"{name!r} of a message: expected texts in {', '.join(MESSAGE)}, or tool_calls."
            )


def _media(message: dict[str, Any], router: bool) -> list[tuple[str, dict[str, Any]]]:
    """Return type and URL object of the media of a message, whose parts are all of a known form.

    vLLM reads more types of parts, and by their other keys also parts without a type: files that
    are not below the media path, other hosts, pickled tensors. What is not known here is refused.
    A `router` also sends the name of a medium, and the grid of one that an encoder has encoded:

        {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 16, 22]}, "uuid": "..."}
    """
    content, media = message.get("content"), []
    if content is None or isinstance(content, str):
        return []
    for part in content if isinstance(content, list) else [None]:
        given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        kind = given.pop("type", None)
        if router and kind in (*MEDIA, *GRIDS):
            given.pop("uuid", None)
        if "uuid" in given:
            raise RequestError(
                "uuid of a media part: it would name an entry of caches that all clients share. "
                "Leave it out; equal media are recognized by their content."
            )
        value = given.pop(kind, None) if kind in (*TEXTS, *MEDIA, *GRIDS) else None
        if router and kind in GRIDS and not given and _is_grid(value):
            continue
        if kind in MEDIA and isinstance(value, dict) and not given:
            known = {k: v for k, v in value.items() if v is not None and k != "detail"}
            if list(known) == ["url"] and isinstance(known["url"], str):
                media.append((kind, value))
                continue
        if kind not in TEXTS or given or not isinstance(value, str | None):
            raise RequestError(
                f"a part of type {str(kind)[:40]!r} with {', '.join(given)[:80] or 'its content'}: "
                f"expected a text, or an image or video such as {FORM}."
            )
    return media


def _is_grid(value: Any) -> bool:
    """Whether a value has lists alone, whose numbers vLLM checks; it reads tensors from texts."""
    return isinstance(value, dict) and all(isinstance(v, list) for v in value.values())


def _set_options(request: Request, options: ServerOptions, ratio: float | None) -> None:
    """Put the setting of a request where vLLM reads it.

    Clients send it in a field of its own, as on `--engine hf`, or as the detail of images. Else it
    has the `ratio` by load, if any.
    """
    kwargs = request.fields.get("mm_processor_kwargs") or {}
    field = request.fields.pop(KEY, None)
    if not isinstance(kwargs, dict):
        return  # vLLM answers this with 400
    given = kwargs.get(KEY)
    if field is not None and given not in (None, field):
        raise OptionError(f'two settings: "{KEY}" and "mm_processor_kwargs" differ. Send one.')
    if field is None and given is None:
        spec = options.low_detail([(kind, url.get("detail")) for kind, url in request.media])
        field = spec and spec.requested
    asked = as_mapping(given if field is None else field, None)
    request.by_load = bool(request.media) and not names_amount(asked)
    if ratio is not None and request.media:
        field = with_ratio(asked, ratio)
    if field is not None:
        request.set("mm_processor_kwargs", {**kwargs, KEY: field})


def _check_text(value: Any) -> None:
    """Refuse unpaired surrogates, which vLLM cannot pass to its engine."""
    for text in _nested(value):
        try:
            isinstance(text, str) and (text.isascii() or text.encode())
        except UnicodeEncodeError:
            raise RequestError("a text contains half of a surrogate pair.") from None


def _nested(value: Any) -> Iterator[Any]:
    """Yield all values in a JSON value, and all names."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def _check_no_media(fields: dict[str, Any]) -> None:
    """Refuse media in a form of other paths, whose size nobody checks."""
    for value in _nested(fields):
        named = isinstance(value, dict) and MEDIA_TYPE.search(str(value.get("type")))
        if named or (isinstance(value, str) and DATA_URL.match(value)):
            raise RequestError(
                "media outside of chat messages: on this path only `messages` may have them, as "
                f"{FORM}."
            )


def _check_sampling(request: dict[str, Any]) -> None:
    """Refuse a seed on a CPU, as vLLM has no way to read a prompt with a seed in several steps."""
    if request.get("seed") is not None and request.get("temperature") != 0 and runs_on_cpu():
        raise RequestError(
            "seed: vLLM on a CPU cannot read a prompt with a seed in several steps, which many "
            "requests at once or n > 1 make necessary. Leave it out, or set temperature to 0."
        )


def runs_on_cpu() -> bool:
    """Whether vLLM runs on a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _pixels(name: str, url: str, limits: Limits, deadline: Deadline) -> int:
    """Check an image, or the frames of a list, and return how many pixels they have; a file: 0."""
    media_type, content = read_url(url, limits)
    if name == "image_url":
        return check_image(content, limits, deadline)
    if media_type != FRAME_LIST:
        return 0
    parts = content.split(b",")
    if len(parts) > limits.frames:
        raise RequestError(f"{len(parts)} frames; the limit is {limits.frames}.", 413)
    frames = (decode_base64(part.decode("ascii")) for part in parts)
    return sum(check_image(frame, limits, deadline, len(parts)) for frame in frames)
