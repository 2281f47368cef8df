"""From the body of a request to a prompt: text within bounds, media decoded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from tokencomp.errors import OptionError, PlanError, RatioError
from tokencomp.method import MethodSpec
from tokencomp.serving import KEY
from tokencomp.serving.hf.deadline import Deadline
from tokencomp.serving.hf.decoder import decode_apart
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.form import call_schema
from tokencomp.serving.hf.frames import with_request
from tokencomp.serving.hf.grammar import Grammar, Grammars
from tokencomp.serving.hf.media import Limits, load_image
from tokencomp.serving.hf.schema import ChatRequest, Message, Part, read_request
from tokencomp.serving.hf.text import PromptText
from tokencomp.serving.hf.tools import CallForm
from tokencomp.serving.hf.video import load_video
from tokencomp.serving.spec import ServerOptions


@dataclass
class Prompt:
    """A checked request with decoded media.

    Attributes
    ----------
    request
        The request as the client sent it.
    chat
        Messages in the form that chat templates expect.
    alone
        Whether the prompt must not share a batch, because nothing could check that it has as many
        placeholders as media.
    images, videos
        RGB images, and uint8 arrays (frames, height, width, 3), in the order of the prompt.
    samplings
        When the frames of each video were shown.
    spec
        Reducer and ratio of the request.
    grammars
        What each of its answers must follow, or None.
    text, text_tokens
        What the chat template makes of the messages, and its number of tokens.
    calls
        How the model writes calls, if its answers may have any.
    limits
        Limits on its media, with the frames that the request chooses.
    """

    request: ChatRequest
    chat: list[dict[str, Any]]
    spec: MethodSpec
    alone: bool = False
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    samplings: list[Any] = field(default_factory=list)
    grammars: list[Grammar | None] = field(default_factory=list)
    text: str = ""
    text_tokens: int = 0
    calls: CallForm | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def pixels(self) -> int:
        """Number of pixels of all decoded media."""
        images = sum(image.width * image.height for image in self.images)
        return images + sum(video[..., 0].size for video in self.videos)


def parse(
    content: bytes | bytearray,
    options: ServerOptions,
    limits: Limits,
    text: PromptText,
    grammars: Grammars,
) -> Prompt:
    """Check a JSON body: its form, then the amount of text, then its tokens. `load` decodes media.

    Parameters
    ----------
    content
        Body of the request.
    options, limits, text
        What requests may ask for, and the bounds of their media and their text.
    grammars
        Makes grammars of `response_format`.

    Raises
    ------
    RequestError
        If the request is malformed, asks for an unsupported feature, or has too much text or too
        many media. The error carries the HTTP status of the answer.
    """
    request = read_request(content)
    prompt = Prompt(request, [], _spec(request, options))
    _check_amount(request, text, limits)
    prompt.chat = [_message(message) for message in request.messages]
    prompt.calls = _call_form(request, text)
    tools = [tool.model_dump(exclude_none=True) for tool in request.offered]
    begun = prompt.calls.opening if prompt.calls and request.must_call else ""
    prompt.text = text.render(prompt.chat, tools) + begun
    prompt.text_tokens = text.check(prompt.chat, prompt.text)
    prompt.grammars = _grammars(request, grammars)
    media = [part.type.removesuffix("_url") for part in request.media]
    prompt.alone = not all(map(text.verifies, media))
    prompt.limits = with_request(request.media_io_kwargs, limits)
    return prompt


def load(prompt: Prompt, text: PromptText, deadline: Deadline) -> None:
    """Decode the media of a prompt, and count the tokens of its images.

    Raises
    ------
    RequestError
        Media are not allowed, damaged, too large, or too many tokens for the model.
    """
    deadline.start()
    for part in prompt.request.media:
        _load(part, prompt, prompt.limits, deadline)
    text.check_images(prompt.text_tokens, prompt.images)


def _check_amount(request: ChatRequest, text: PromptText, limits: Limits) -> None:
    """Refuse a request by the amount of its text and its media, before either is processed."""
    parts = [part for message in request.messages for part in message.parts]
    tools = [tool.model_dump_json() for tool in request.tools or []]
    called = [
        c.function.arguments for message in request.messages for c in message.tool_calls or []
    ]
    names = [message.name or "" for message in request.messages]
    texts = [part.text or "" for part in parts] + tools + called + names
    text.check_size(sum(map(len, texts)), len(texts))
    if len(request.media) > limits.max_items:
        raise RequestError(f"more than {limits.max_items} images and videos.", 413)


def _spec(request: ChatRequest, options: ServerOptions) -> MethodSpec:
    """Return reducer and ratio of the request, or the server's default."""
    fields = (request.tokencomp, (request.mm_processor_kwargs or {}).get(KEY))
    given = [field for field in fields if field is not None]
    media = [(part.type, getattr(part, part.type)) for part in request.media]
    details = [(kind, url.detail) for kind, url in media if url is not None]
    try:
        if not given and (low := options.low_detail(details)) is not None:
            return low
        spec, *others = [options.resolve(field, engine="hf") for field in given or [None]]
        if any(other != spec for other in others):
            raise OptionError(f'two settings: "{KEY}" and "mm_processor_kwargs" differ. Send one.')
        return spec
    except (OptionError, PlanError, RatioError) as error:
        raise RequestError(str(error)) from None


def _content(message: Message) -> list[dict[str, Any]]:
    """Return the parts of a message in the form that chat templates expect."""
    if message.content is None and message.role != "assistant":
        raise RequestError(f"a message of role {message.role!r} needs a content.")
    content = []
    for part in message.parts:
        value = getattr(part, part.type)
        if value is None:
            raise RequestError(f"a part of type {part.type!r} needs a field {part.type!r}.")
        kind = part.type.removesuffix("_url")
        content.append({"type": kind, "text": value} if kind == "text" else {"type": kind})
    return content


def _message(message: Message) -> dict[str, Any]:
    """Return a message in the form that chat templates expect."""
    content: Any = _content(message)
    if message.role == "tool" and all(part["type"] == "text" for part in content):
        content = "".join(part["text"] for part in content)
    known: dict[str, Any] = {"role": message.template_role, "content": content}
    if message.name is not None:
        known["name"] = message.name
    if message.tool_calls:
        calls = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        for call in calls:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        known["tool_calls"] = calls
    return known


def _call_form(request: ChatRequest, text: PromptText) -> CallForm | None:
    """Return how calls are written, if the request has tools to call."""
    called = any(message.tool_calls or message.role == "tool" for message in request.messages)
    if (request.tools or called) and text.calls is None:
        raise RequestError(
            "not served: tools. This model's chat template has no place for them, or writes calls "
            "in a form that is not known here. Describe the calls in the prompt and ask for JSON: "
            '"response_format": {"type": "json_schema", ...}; or use the vLLM engine.'
        )
    return text.calls if request.offered else None


def _grammars(request: ChatRequest, grammars: Grammars) -> list[Grammar | None]:
    """Return what each answer must follow."""
    if request.must_call:
        calls = [call_schema(tool.function) for tool in request.offered]
        return [*grammars.of(json.dumps({"anyOf": calls}), request.n, "tool_choice")]
    schema = request.response_format.schema_text() if request.response_format else ""
    return [*grammars.of(schema, request.n)] if schema else [None] * request.n


def _load(part: Part, prompt: Prompt, limits: Limits, deadline: Deadline) -> None:
    """Decode an image or a video into the prompt, within what is left of the limits."""
    deadline.check()
    remaining = replace(limits, max_total_pixels=limits.max_total_pixels - prompt.pixels)
    if part.image_url is not None and part.type == "image_url":
        prompt.images.append(load_image(part.image_url.url, remaining, deadline))
    elif part.video_url is not None:
        frames, sampling = load_video(part.video_url.url, remaining, deadline, decode_apart)
        prompt.videos.append(frames)
        prompt.samplings.append(sampling)
