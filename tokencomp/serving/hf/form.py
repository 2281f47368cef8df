"""Objects of a request that refuse unknown fields, and the form that an answer must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """An object whose unknown fields are kept, so that they can be refused by name."""

    model_config = ConfigDict(extra="allow")

    def unserved(self, where: str, off: Mapping[str, tuple[Any, ...]]) -> list[str]:
        """Return the unknown fields that ask for something that this server does not do.

        Parameters
        ----------
        where
            Path of this object in the request, with a dot at its end.
        off
            Values of unknown fields that ask for what the server does anyway.
        """
        fields = (self.model_extra or {}).items()
        return [
            where + name
            for name, value in fields
            if value is not None and value not in off.get(name, ())
        ]


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
        """Return the JSON schema that an answer in JSON follows, as text."""
        if self.type == "json_schema" and self.json_schema is not None:
            return json.dumps(self.json_schema.definition)
        return json.dumps({"type": "object"})
