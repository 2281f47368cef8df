"""The fields of a chat completion on transformers: those of answers, and tools."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Json, field_validator, model_validator

from tokencomp.serving import KEY
from tokencomp.serving.request import Chat, Message, Strict

MAX_ANSWERS = 16  # to one request; each is computed from the whole prompt
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # every generated token is compared with all of them
SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # fields that all rows of a batch share

# Fields without an implementation, and the values under which that makes no difference.
OFF: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "priority": (0,),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
}
# Fields of clients and gateways that change no answer. vLLM ignores them too, but reads the first
# of those in the last line.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort", "verbosity",
)  # fmt: skip


# -- messages --------------------------------------------------------------------------------------


class CalledFunction(Strict):
    """A function with its arguments, which a client sends as text."""

    name: str
    arguments: Json[dict[str, Any]]


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class HfMessage(Message):
    """A message with the calls of tools that it answers or asks for."""

    # Clients send messages back that they received, with all of their empty fields.
    off = dict.fromkeys(("reasoning", "reasoning_content", "refusal"), ("",))

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _of_role(self) -> HfMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f'"tool_calls" belong to the role "assistant", not {self.role!r}')
        if self.tool_call_id and self.role != "tool":
            raise ValueError(f'"tool_call_id" belongs to the role "tool", not {self.role!r}')
        return self

    @property
    def template_role(self) -> str:
        """The role for chat templates; "developer" is OpenAI's newer name of "system"."""
        return "system" if self.role == "developer" else self.role


# -- the form of an answer -------------------------------------------------------------------------


class StreamOptions(Strict):
    """Options of a streamed answer."""

    off: ClassVar[dict[str, tuple[bool, ...]]] = {
        "continuous_usage_stats": (False,),
        "include_obfuscation": (False, True),  # padding of events, against observers of their sizes
    }

    include_usage: bool = False


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def call_schema(self) -> dict[str, Any]:
        arguments = self.parameters or {"type": "object", "additionalProperties": False}
        properties = {"name": {"const": self.name}, "arguments": arguments}
        closed = {"required": [*properties], "additionalProperties": False}
        return {"type": "object", "properties": properties, **closed}


class Tool(Strict):
    """OpenAI's object around a function; as a `tool_choice` it needs a name alone."""

    type: Literal["function"]
    function: Function


class JsonSchema(Strict):
    """OpenAI's object around a JSON schema."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    definition: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('"type": "json_schema" needs a field "json_schema"')
        return self

    def schema_text(self) -> str:
        """Return the JSON schema of the answer, or "" for any text."""
        if self.type == "text":
            return ""
        if self.type == "json_schema" and self.json_schema is not None:
            return json.dumps(self.json_schema.definition)
        return json.dumps({"type": "object"})


# -- the request -----------------------------------------------------------------------------------


class HfChat(Chat[HfMessage]):
    """A chat-completions request; the generation config has omitted sampling parameters."""

    off, ignored = OFF, IGNORED

    model: str = ""
    messages: Annotated[list[HfMessage], Field(min_length=1, fail_fast=True)]
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
    def _consistent(self) -> HfChat:
        if self.top_logprobs and not self.logprobs:
            raise ValueError('"top_logprobs" needs "logprobs": true')
        json_wanted = self.response_format is not None and self.response_format.type != "text"
        if self.ignore_eos and json_wanted:
            raise ValueError('"ignore_eos" with "response_format": an answer in JSON ends')
        names = [tool.function.name for tool in self.tools or []]
        if self.must_call and (self.ignore_eos or not names):
            raise ValueError('"tool_choice" of a call needs "tools", and no "ignore_eos"')
        if isinstance(self.tool_choice, Tool) and self.tool_choice.function.name not in names:
            raise ValueError(f'"tool_choice" names none of the tools {", ".join(names)}')
        if self.offered and json_wanted:
            raise ValueError('"tools" with "response_format": a call has a form of its own')
        return self

    def unserved(self, where: str = "") -> list[str]:
        """Also the processor options of others."""
        others = [name for name in self.mm_processor_kwargs or {} if name != KEY]
        return super().unserved(where) + [f"mm_processor_kwargs.{name}" for name in others]

    @property
    def must_call(self) -> bool:
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
        texts = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        return [text for text in texts if text]

    @property
    def answer_schema(self) -> str:
        """JSON schema that the answer follows, or "" for any text."""
        if self.must_call:
            return json.dumps({"anyOf": [tool.function.call_schema() for tool in self.offered]})
        return self.response_format.schema_text() if self.response_format else ""
