"""The settings table `[otlp]`: which resource is which agent, and what tells its keys apart."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Names = Annotated[list[str], Field(min_length=1)]


class OtlpConfig(BaseModel):
    """The settings table `[otlp]`.

    `id` are resource attributes, of which the first that a resource has is its agent's id. `include` or `exclude` says
    which attributes of a metric's points belong to the key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: _Names = ["service.instance.id", "host.id", "host.name"]
    include: list[str] | None = None
    exclude: _Names | None = None

    def __str__(self) -> str:
        return self.model_dump_json(exclude_unset=True)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.include is not None and self.exclude is not None:
            raise ValueError("include and exclude exclude each other: include names all attributes that are taken")
        return self
