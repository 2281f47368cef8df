"""What the body of a chat completion must have before vLLM sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tokencomp.errors import OptionError, RatioError
from tokencomp.serving import KEY
from tokencomp.serving.hf.deadline import Deadline
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.frames import with_request
from tokencomp.serving.hf.media import (
    FRAME_LIST,
    Limits,
    check_image,
    decode_base64,
    read_url,
)
from tokencomp.serving.hf.schema import check_structure
from tokencomp.serving.spec import ServerOptions
from tokencomp.serving.vllm.rules import Rules

MEDIA = ("image_url", "video_url")


def check_request(body: bytes, rules: Rules, options: ServerOptions) -> bytes:
    """Check a JSON body, and its pictures without decoding their pixels.

    vLLM reads the body with the same parser, so it sees what was checked here. Returned is the body
    that vLLM gets. Only `detail` "low" changes it: into the ratio of `options`.
    """
    check_structure(body)
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({type(error).__name__}).") from None
    if not isinstance(request, dict):
        raise RequestError("the body must be a JSON object.")
    if not rules.media_options:
        with_request(request.get("media_io_kwargs"), rules.limits)
    _check_text(request)
    _check_sampling(request)
    _check_media(request, rules)
    try:
        return _with_detail(request, options) or body
    except (OptionError, RatioError) as error:
        raise RequestError(str(error)) from None


def _with_detail(request: dict[str, Any], options: ServerOptions) -> bytes | None:
    """Return the body of a request for images in low detail with their ratio, else None."""
    media = [(p, name) for p in _parts(request) for name in MEDIA if isinstance(p.get(name), dict)]
    details = [(name, part[name].get("detail")) for part, name in media]
    kwargs = request.get("mm_processor_kwargs") or {}
    if not isinstance(kwargs, dict) or KEY in kwargs:
        return None
    spec = options.low_detail(details)
    if spec is None:
        return None
    return json.dumps({**request, "mm_processor_kwargs": {**kwargs, KEY: spec.requested}}).encode()


def _check_text(value: Any) -> None:
    """Refuse halves of surrogate pairs, which vLLM cannot hand to its engine."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            try:
                value.isascii() or value.encode()
            except UnicodeEncodeError:
                raise RequestError("a text contains half of a surrogate pair.") from None


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


def _check_media(request: dict[str, Any], rules: Rules) -> None:
    """Check all media of a request within limits that they share."""
    limits = rules.limits
    deadline, left, count = Deadline(limits.decode_seconds), limits.max_total_pixels, 0
    for part in _parts(request):
        if part.get("uuid") is not None:
            raise RequestError(
                "uuid of a media part: it would name an entry of caches that all clients share. "
                "Leave it out; equal media are recognized by their content."
            )
        for name in MEDIA:
            url = part.get(name)
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                continue  # vLLM answers this with 400
            count += 1
            if count > limits.max_items:
                raise RequestError(f"more than {limits.max_items} images and videos.", 413)
            if not (rules.remote_media and url[:4].lower() == "http"):
                left -= _pixels(name, url, replace(limits, max_total_pixels=left), deadline)
    if count and request.get("truncate_prompt_tokens") is not None:
        raise RequestError("truncate_prompt_tokens would cut media. Leave it out.")


def _pixels(name: str, url: str, limits: Limits, deadline: Deadline) -> int:
    """Check an image, or the frames of a list, and return how many pixels they have.

    Files of videos count as 0: `frames.ChosenFrames` decodes them, within the same limits for each.
    """
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


def _parts(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of all messages that may be media."""
    for message in _objects(request.get("messages")):
        yield from _objects(message.get("content"))


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list, and none of anything else."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
