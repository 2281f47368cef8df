"""The supported part of OpenAI's chat-completions request; other fields are refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokencomp.errors import OptionError, RatioError
from tokencomp.method import MethodSpec
from tokencomp.serving.hf.deadline import Deadline
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.media import Limits, load_image
from tokencomp.serving.hf.video import load_video
from tokencomp.serving.spec import ServerOptions

# Fields of the API that never change an answer, and values of other fields that mean "off".
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
OFF: dict[str, Any] = {
    "repetition_penalty": 1,
    "tool_choice": "none",
    "top_k": -1,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}


FORMS = ("str", "list[Part]", "list[str]")  # pydantic's names for the alternative types of a field


class Url(BaseModel):
    """OpenAI's object around a media URL."""

    url: str


class Part(BaseModel):
    """One part of a message: text, an image or a video."""

    type: Literal["text", "image_url", "video_url"]
    text: str | None = None
    image_url: Url | None = None
    video_url: Url | None = None

    @field_validator("image_url", "video_url", mode="before")
    @classmethod
    def _object(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError('expected an object {"url": ...}, not the URL itself')
        return value


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None

    @property
    def template_role(self) -> str:
        """The role for chat templates; "developer" is OpenAI's newer name of "system"."""
        return "system" if self.role == "developer" else self.role


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat-completions request.

    A sampling parameter that the client leaves out has the value of the model's generation config.
    """

    model_config = ConfigDict(extra="allow")

    model: str = ""
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int | None = 1
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    tokencomp: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer; empty texts are ignored."""
        texts = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        return [text for text in texts if text]


@dataclass
class Prompt:
    """A checked request with decoded media.

    Attributes
    ----------
    request
        The request as the client sent it.
    chat
        Messages in the form that chat templates expect.
    images, videos
        RGB images, and uint8 arrays (frames, height, width, 3), in the order of the prompt.
    spec
        Reducer and ratio of the request.
    """

    request: ChatRequest
    chat: list[dict[str, Any]]
    spec: MethodSpec
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)

    @property
    def pixels(self) -> int:
        """Number of pixels of all decoded media."""
        images = sum(image.width * image.height for image in self.images)
        return images + sum(video[..., 0].size for video in self.videos)


def parse(body: Any, options: ServerOptions, limits: Limits) -> Prompt:
    """Check a decoded JSON body and load its media.

    Raises
    ------
    RequestError
        If the request is malformed, asks for an unsupported feature, or has media that are not
        allowed. The error carries the HTTP status of the answer.
    """
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise RequestError(_message(error)) from None
    wrong = _unserved(request)
    if wrong:
        raise RequestError(f"not served: {', '.join(wrong)}. Leave it out.")
    prompt = Prompt(request, [], _spec(request, options))
    deadline = Deadline(limits.decode_seconds)
    for message in request.messages:
        content = _content(message, prompt, limits, deadline)
        prompt.chat.append({"role": message.template_role, "content": content})
    return prompt


def _message(error: ValidationError) -> str:
    """Return the message of the first error.

    A field with several alternative types has one error per alternative. The deepest error location
    belongs to the alternative that fits best, so its messages are returned.
    """
    every = error.errors()
    fields = [tuple(part for part in e["loc"] if part not in FORMS) for e in every]
    deepest = max(fields[: _same_field(fields)], key=len)
    messages = [e["msg"] for e, field in zip(every, fields, strict=True) if field == deepest]
    return f"{'.'.join(map(str, deepest)) or 'body'}: {' / '.join(dict.fromkeys(messages))}"


def _same_field(fields: list[tuple[Any, ...]]) -> int:
    """Return how many errors, from the first on, concern the same field as the first."""
    first = fields[0]
    return next((i for i, f in enumerate(fields) if f[: len(first)] != first), len(fields))


def _unserved(request: ChatRequest) -> list[str]:
    """Return the fields that would change the answer but are not supported."""
    wrong = [
        name
        for name, value in (request.model_extra or {}).items()
        if value and name not in HARMLESS and value != OFF.get(name)
    ]
    wrong += [
        f"mm_processor_kwargs.{name}"
        for name in request.mm_processor_kwargs or {}
        if name != "tokencomp"
    ]
    return wrong + ([f"n={request.n}"] if request.n not in (None, 1) else [])


def _spec(request: ChatRequest, options: ServerOptions) -> MethodSpec:
    fields = request.tokencomp
    if fields is None:
        fields = (request.mm_processor_kwargs or {}).get("tokencomp")
    try:
        return options.resolve(fields, engine="hf")
    except (OptionError, RatioError) as error:
        raise RequestError(str(error)) from None


def _content(
    message: Message, prompt: Prompt, limits: Limits, deadline: Deadline
) -> list[dict[str, Any]]:
    """Return the parts of a message for the chat template, and load its media into `prompt`."""
    if message.content is None and message.role != "assistant":
        raise RequestError(f"a message of role {message.role!r} needs a content.")
    if message.content is None or isinstance(message.content, str):
        return [{"type": "text", "text": message.content or ""}]
    parts: list[dict[str, Any]] = []
    for part in message.content:
        value = getattr(part, part.type)
        if value is None:
            raise RequestError(f"a part of type {part.type!r} needs a field {part.type!r}.")
        if part.type == "text":
            parts.append({"type": "text", "text": value})
            continue
        if len(prompt.images) + len(prompt.videos) >= limits.max_items:
            raise RequestError(f"more than {limits.max_items} images and videos.", 413)
        remaining = replace(limits, max_total_pixels=limits.max_total_pixels - prompt.pixels)
        if part.type == "image_url":
            prompt.images.append(load_image(value.url, remaining, deadline))
            parts.append({"type": "image"})
        else:
            prompt.videos.append(load_video(value.url, remaining, deadline))
            parts.append({"type": "video"})
    return parts
