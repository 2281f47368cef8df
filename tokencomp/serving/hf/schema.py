"""The part of OpenAI's chat-completions request that is served; the rest is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokencomp.errors import OptionError, RatioError
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.media import Limits, load_image, load_video
from tokencomp.serving.spec import ServerOptions, Spec

# fields of the API that change no answer, and values of others that mean "off"
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
OFF: dict[str, Any] = {
    "repetition_penalty": 1,
    "tool_choice": "none",
    "top_k": -1,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}


FORMS = ("str", "list[Part]", "list[str]")  # how pydantic names the forms of a field


class Url(BaseModel):
    url: str


class Part(BaseModel):
    """One piece of a message."""

    type: Literal["text", "image_url", "video_url"]
    text: str | None = None
    image_url: Url | None = None
    video_url: Url | None = None

    @field_validator("image_url", "video_url", mode="before")
    @classmethod
    def _object(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise ValueError('expected an object {"url": ...}, not the URL itself')
        return given


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None

    @property
    def spoken_by(self) -> str:
        """The role as chat templates know it: "developer" is OpenAI's newer word for "system"."""
        return "system" if self.role == "developer" else self.role


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """Sampling parameters left out mean the model's own generation config."""

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
        given = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        return [text for text in given if text]


@dataclass
class Prompt:
    """A request with its media decoded.

    Attributes
    ----------
    chat
        Messages as chat templates expect them.
    images, videos
        RGB images, and uint8 arrays (frames, height, width, 3), in prompt order.
    spec
        Reducer and ratio.
    """

    request: ChatRequest
    chat: list[dict[str, Any]]
    spec: Spec
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)

    @property
    def pixels(self) -> int:
        """Pixels of all decoded media."""
        images = sum(image.width * image.height for image in self.images)
        return images + sum(video[..., 0].size for video in self.videos)


def parse(body: Any, options: ServerOptions, limits: Limits) -> Prompt:
    """Check a decoded JSON body and load its media.

    Raises
    ------
    RequestError
        With the HTTP status to answer.
    """
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise RequestError(_told(error)) from None
    wrong = _unserved(request)
    if wrong:
        raise RequestError(f"not served: {', '.join(wrong)}. Leave it out.")
    prompt = Prompt(request, [], _spec(request, options))
    for message in request.messages:
        content = _content(message, prompt, limits)
        prompt.chat.append({"role": message.spoken_by, "content": content})
    return prompt


def _told(error: ValidationError) -> str:
    """The first error; of a field that may have several forms, that of the form that fits best."""
    every = error.errors()
    fields = [tuple(part for part in e["loc"] if part not in FORMS) for e in every]
    deepest = max(fields[: _same_field(fields)], key=len)
    messages = [e["msg"] for e, field in zip(every, fields, strict=True) if field == deepest]
    return f"{'.'.join(map(str, deepest)) or 'body'}: {' / '.join(dict.fromkeys(messages))}"


def _same_field(fields: list[tuple[Any, ...]]) -> int:
    """How many errors, from the first on, lie in the field of the first."""
    first = fields[0]
    return next((i for i, f in enumerate(fields) if f[: len(first)] != first), len(fields))


def _unserved(request: ChatRequest) -> list[str]:
    """Fields that would change the answer if they were served."""
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


def _spec(request: ChatRequest, options: ServerOptions) -> Spec:
    given = request.tokencomp
    if given is None:
        given = (request.mm_processor_kwargs or {}).get("tokencomp")
    try:
        return options.resolve(given, engine="hf")
    except (OptionError, RatioError) as error:
        raise RequestError(str(error)) from None


def _content(message: Message, prompt: Prompt, limits: Limits) -> list[dict[str, Any]]:
    if message.content is None and message.role != "assistant":
        raise RequestError(f"a message of role {message.role!r} needs a content.")
    if message.content is None or isinstance(message.content, str):
        return [{"type": "text", "text": message.content or ""}]
    parts: list[dict[str, Any]] = []
    for part in message.content:
        given = getattr(part, part.type)
        if given is None:
            raise RequestError(f"a part of type {part.type!r} needs a field {part.type!r}.")
        if part.type == "text":
            parts.append({"type": "text", "text": given})
            continue
        if len(prompt.images) + len(prompt.videos) >= limits.max_items:
            raise RequestError(f"more than {limits.max_items} images and videos.", 413)
        room = replace(limits, max_total_pixels=limits.max_total_pixels - prompt.pixels)
        if part.type == "image_url":
            prompt.images.append(load_image(given.url, room))
            parts.append({"type": "image"})
        else:
            prompt.videos.append(load_video(given.url, room))
            parts.append({"type": "video"})
    return parts
