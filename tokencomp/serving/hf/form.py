"""Objects of a request that refuse unknown fields, and the form that an answer must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """An object whose unknown fields are kept, so that they can be refused by name."""

    model_config = ConfigDict(extra="allow")

    off: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values of unknown fields that ask for what the server does anyway."""

    def unserved(self, where: str = "") -> list[str]:
        """Return the unknown fields, at any depth, that ask for something that is not done.

        Parameters
        ----------
        where
            Path of this object in the request, with a dot at its end.
        """
        wrong = [
            where + name
            for name, value in (self.model_extra or {}).items()
            if value is not None and value not in self.off.get(name, ())
        ]
        for name in type(self).model_fields:
            value = getattr(self, name)
            items = enumerate(value) if isinstance(value, list) else [("", value)]
            for i, item in items:
                if isinstance(item, Strict):
                    wrong += item.unserved(f"{where}{name}.{i}." if i != "" else f"{where}{name}.")
        return wrong


class JsonSchema(Strict):
    """OpenAI's object around a JSON schema."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    definition: dict[str, Any] = Field(alias="schema")


class StreamOptions(Strict):
    """Options of a streamed answer."""

    off = {
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


class Tool(Strict):
    """OpenAI's object around a function; as a `tool_choice` it needs a name alone."""

    type: Literal["function"]
    function: Function


class CalledFunction(Strict):
    """A function with its arguments, which are a JSON object as text."""

    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _object(cls, value: str) -> str:
        try:
            if isinstance(json.loads(value), dict):
                return value
        except (ValueError, RecursionError):
            pass
        raise ValueError('expected a JSON object as text, such as "{}"')


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


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
        """Return the JSON schema that an answer in JSON follows, or "" for any answer."""
        if self.type == "text":
            return ""
        if self.type == "json_schema" and self.json_schema is not None:
            return json.dumps(self.json_schema.definition)
        return json.dumps({"type": "object"})


def call_schema(function: Function) -> dict[str, Any]:
    """Return the JSON schema of a call of that function."""
    arguments = function.parameters or {"type": "object", "additionalProperties": False}
    properties = {"name": {"const": function.name}, "arguments": arguments}
    closed = {"required": [*properties], "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}
