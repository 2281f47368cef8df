"""What the result files of all tables for GPUs share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1


class Strict(BaseModel):
    """A part of a result file: other fields than those named are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(Strict):
    """Where the numbers of a file come from."""

    model: str
    date: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$", description="Of a checkout without changes.")
    versions: dict[str, str]
    hardware: dict[str, Any]
