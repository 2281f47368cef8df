"""The supported part of OpenAI's chat-completions request; other fields are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from tokencomp.serving import KEY
from tokencomp.serving.hf.errors import RequestError
from tokencomp.serving.hf.form import (
    ResponseFormat,
    StreamOptions,
    Strict,
    Tool,
    ToolCall,
)
from tokencomp.serving.spec import REQUEST_KEYS

MAX_STRUCTURE = 1_000_000  # JSON objects, lists and their elements; each costs memory
MAX_ANSWERS = 16  # to one request; each is computed from the whole prompt
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # every generated token is compared with all of them

# Fields of the API that never change an answer.
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Values of further fields that ask for what this server does anyway. Every other value is refused.
OFF: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "priority": (0,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
}

# The same for a message. Clients send those that they received, with all of their empty fields.
MESSAGE_OFF: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
}
# pydantic's names for the alternative types of a field
FORMS = ("str", "list[Part]", "list[str]", "literal['none','auto','required']", "Tool")


class Url(Strict):
    """OpenAI's object around a media URL."""

    url: str
    detail: Literal["auto", "high", "low"] | None = None


class Part(Strict):
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


class Message(Strict):
    """One message of a conversation."""

    off = MESSAGE_OFF

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _of_role(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f'"tool_calls" belong to the role "assistant", not {self.role!r}')
        if self.tool_call_id and self.role != "tool":
            raise ValueError(f'"tool_call_id" belongs to the role "tool", not {self.role!r}')
        return self

    @property
    def parts(self) -> list[Part]:
        """The parts of the content; one that is a string is a part of text."""
        if self.content is None or isinstance(self.content, str):
            return [Part(type="text", text=self.content or "")]
        return self.content

    @property
    def template_role(self) -> str:
        """The role for chat templates; "developer" is OpenAI's newer name of "system"."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(Strict):
    """A chat-completions request.

    A sampling parameter that the client leaves out has the value of the model's generation config.
    """

    off = OFF

    model: str = ""
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = True
    stop: str | list[str] | None = None
    ignore_eos: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    tokencomp: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None

    @field_validator("stop")
    @classmethod
    def _bounded(cls, value: str | list[str] | None) -> Any:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > MAX_STOPS or any(len(text) > MAX_STOP_LENGTH for text in texts):
            raise ValueError(
                f"at most {MAX_STOPS} texts of at most {MAX_STOP_LENGTH} characters are allowed"
            )
        return value

    @field_validator("n", mode="before")
    @classmethod
    def _default(cls, value: Any) -> Any:
        return 1 if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError('"top_logprobs" needs "logprobs": true')
        if self.ignore_eos and self.response_format and self.response_format.type != "text":
            raise ValueError('"ignore_eos" beside "response_format": an answer in JSON ends')
        names = [tool.function.name for tool in self.tools or []]
        if self.must_call and (self.ignore_eos or not names):
            raise ValueError('"tool_choice" of a call needs "tools", and no "ignore_eos"')
        if isinstance(self.tool_choice, Tool) and self.tool_choice.function.name not in names:
            raise ValueError(f'"tool_choice" names none of the tools {", ".join(names)}')
        if self.offered and self.response_format and self.response_format.type != "text":
            raise ValueError('"tools" beside "response_format": a call has a form of its own')
        return self

    @property
    def media(self) -> list[Part]:
        """The images and videos in the order of the prompt."""
        return [part for message in self.messages for part in message.parts if part.type != "text"]

    @property
    def must_call(self) -> bool:
        """Whether the answer is a call in any case."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def offered(self) -> list[Tool]:
        """Tools that the answer may call."""
        choice, tools = self.tool_choice, self.tools or []
        if isinstance(choice, Tool):
            return [tool for tool in tools if tool.function.name == choice.function.name]
        return [] if choice == "none" else tools

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer; empty texts are ignored."""
        texts = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        return [text for text in texts if text]


def read_request(content: bytes | bytearray) -> ChatRequest:
    """Return the checked request of a JSON body."""
    check_structure(content)
    try:
        request = ChatRequest.model_validate_json(content)
    except ValidationError as error:
        raise RequestError(_message(error)) from None
    wrong = [name for name in request.unserved() if name not in HARMLESS]
    wrong += [f"mm_processor_kwargs.{n}" for n in request.mm_processor_kwargs or {} if n != KEY]
    if wrong:
        own = [name for name in wrong if name.rpartition(".")[2] in REQUEST_KEYS]
        fix = f'Write it as "{KEY}": {{"ratio": ...}}.' if own else "Leave it out."
        raise RequestError(f"not served: {', '.join(own or wrong)}. {fix}")
    return request


def check_structure(content: bytes | bytearray) -> None:
    """Refuse a JSON body of too many values, before it is parsed.

    Containers of the parsed body take up to a hundred times as many bytes as their text.
    """
    if sum(content.count(mark) for mark in (b"{", b"[", b",")) > MAX_STRUCTURE:
        raise RequestError(f"the body has more than {MAX_STRUCTURE} JSON values.", 413)


def _message(error: ValidationError) -> str:
    """Return the messages about one wrong field.

    A field with several alternative types has one error per alternative. The deepest error location
    belongs to the alternative that fits best.
    """
    messages: dict[tuple[Any, ...], dict[str, None]] = {}  # by field, in order and each once
    for e in error.errors(include_url=False, include_input=False):
        field = tuple(part for part in e["loc"] if part not in FORMS)
        messages.setdefault(field, {})[e["msg"]] = None
    deepest = max(messages, key=len)
    return f"{'.'.join(map(str, deepest)) or 'body'}: {' / '.join(messages[deepest])}"
