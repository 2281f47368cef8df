"""The body of a chat completion, read once, in the same way by the servers on both engines.

`Chat` has the fields with which media and their compression are asked for. The server on
transformers adds those of answers (`hf.fields`), and refuses all others. vLLM knows its own fields,
which pass (`vllm.request_checks`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json, to_json
from typing_extensions import Self

from tokencomp.errors import OptionError, PlanError, RatioError
from tokencomp.method import Method
from tokencomp.serving import KEY
from tokencomp.serving.limits import FORMS, Limits, RequestError, check_form, check_structure
from tokencomp.serving.spec import REQUEST_KEYS, ServerOptions

# pydantic's names for the alternative types of a field: str, list[…], literal[…], a class
ALTERNATIVES = re.compile(r"(str|Tool)$|(list|literal|function-\w+)\[")


class Strict(BaseModel):
    """An object that keeps unknown fields, so that they can be refused by name."""

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="constants")

    ignored: ClassVar[tuple[str, ...]] = ()
    """Fields of clients and gateways that change no answer; they are dropped."""
    off: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values of unknown fields that ask for what the server does anyway."""
    empty: ClassVar[tuple[Any, ...]] = (None, [], {})
    """Values of unknown fields that ask for nothing."""
    closed: ClassVar[bool] = True
    """Whether unknown fields are refused."""

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in cls.ignored}

    def unserved(self, where: str = "") -> list[str]:
        """Paths below `where` of unknown fields whose values change the answer."""
        wrong = [
            where + name
            for name, value in (self.model_extra or {}).items()
            if self.closed and value not in (*self.empty, *self.off.get(name, ()))
        ]
        for name in type(self).model_fields:
            value = getattr(self, name)
            items = enumerate(value) if isinstance(value, list) else [("", value)]
            for i, item in items:
                if isinstance(item, Strict):
                    wrong += item.unserved(f"{where}{name}.{i}." if i != "" else f"{where}{name}.")
        return wrong


class Url(Strict):
    """OpenAI's object around a media URL."""

    ignored, empty = ("format",), (None,)

    url: str
    detail: Literal["auto", "high", "low"] | None = None


class AnyPart(Strict):
    """One part of a message, which has the field that its type names, and perhaps a name."""

    ignored, empty = ("cache_control",), (None,)

    type: str

    @model_validator(mode="after")
    def _of_type(self) -> Self:
        names = type(self).model_fields.keys() - {"type", "uuid"}
        if [name for name in names if getattr(self, name) is not None] != [self.type]:
            raise ValueError(f"a part of type {self.type!r} needs a field {self.type!r} alone")
        return self


class Part(AnyPart):
    """A text, an image or a video.

    vLLM reads more types, and by their other keys also parts without a type: files that are not
    below the media path, other hosts, pickled tensors. Its `uuid` would name an entry of caches
    that all clients share.
    """

    type: Literal["text", "refusal", "image_url", "video_url"]
    text: str | None = None
    refusal: str | None = None
    image_url: Url | None = None
    video_url: Url | None = None

    @property
    def kind(self) -> str:
        """ "text", "image" or "video"."""
        return "text" if self.words is not None else self.type.removesuffix("_url")

    @property
    def words(self) -> str | None:
        """The text; None of a medium."""
        return self.text if self.refusal is None else self.refusal

    @property
    def medium(self) -> Url:
        """The URL object of an image or a video."""
        value = self.image_url or self.video_url
        assert value is not None
        return value


class Message(Strict):
    """One message of a conversation."""

    ignored = ("annotations", "cache_control")

    role: str
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def parts(self) -> list[Part]:
        if self.content is None or isinstance(self.content, str):
            return [Part(type="text", text=self.content or "")]
        return self.content


M = TypeVar("M", bound=Message)


class Chat(Strict, Generic[M]):
    """Messages, and how their media are read and compressed."""

    messages: Annotated[list[M], Field(fail_fast=True)]
    tokencomp: Any = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None

    @property
    def media(self) -> list[Part]:
        """The images and videos in the order of the prompt."""
        lists = [m.content for m in self.messages if isinstance(m.content, list)]
        parts = [part for parts in lists for part in parts]
        return [part for part in parts if isinstance(part, Part) and part.kind != "text"]

    def method(
        self, options: ServerOptions, engine: str, ratio: float | None
    ) -> tuple[Method, bool]:
        """The method of the request, and whether the load of the server may choose its ratio.

        A request without options gets the method of images of low detail, or the default, with the
        `ratio` by load if it has media. Raises `RequestError`.
        """
        media = [(part.type, part.medium.detail) for part in self.media]
        fields = self.tokencomp, (self.mm_processor_kwargs or {}).get(KEY)
        given = [field for field in fields if field is not None]
        try:
            return options.of_request(given, media, engine, ratio)
        except (OptionError, PlanError, RatioError) as error:
            raise RequestError(str(error)) from None


C = TypeVar("C", bound=Chat[Any])


def read_request(kind: type[C], content: bytes | bytearray, limits: Limits) -> C:
    """Read a JSON body, and check all of it but the media. Raises `RequestError`."""
    check_structure(content)
    try:
        fields = from_json(content)
        for name in FORMS if isinstance(fields, dict) else ():
            check_form(name, to_json(fields.get(name)))
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise RequestError(_message(error)) from None
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"body: Invalid JSON: {error}") from None
    if wrong := request.unserved():
        own = [name for name in wrong if name.rpartition(".")[2] in REQUEST_KEYS]
        fix = f'Write it as "{KEY}": {{"ratio": ...}}.' if own else "Leave it out."
        raise RequestError(f"not served: {', '.join(own or wrong)}. {fix}")
    if len(request.media) > limits.max_items:
        raise RequestError(f"more than {limits.max_items} images and videos.", 413)
    return request


def _message(error: ValidationError) -> str:
    """Messages about one wrong field: of alternative types the deepest location."""
    messages: dict[tuple[Any, ...], dict[str, None]] = {}  # by field, in order and each once
    for e in error.errors(include_url=False, include_input=False):
        field = tuple(part for part in e["loc"] if not ALTERNATIVES.match(str(part)))
        messages.setdefault(field, {})[e["msg"]] = None
    deepest = max(messages, key=len)
    return f"{'.'.join(map(str, deepest)) or 'body'}: {' / '.join(messages[deepest])}"
