"""Settings for what the records of the events topic hold."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from pipeline.errors import ConfigError
from pipeline.formats.mapping.config import MappingConfig
from pipeline.formats.otlp.config import OtlpConfig
from pipeline.formats.registry_settings import RegistrySettings

_PREFIX: Final = "AGENT_METADATA_"
_NO_TABLE: Final = "must be a table of the TOML file, or in the environment an object in JSON"
_TABLES: Final[dict[str, type[BaseModel]]] = {"mapping": MappingConfig, "otlp": OtlpConfig}

EventsFormat = Literal["json", "otlp_json", "otlp_proto"]


class FormatSettings(RegistrySettings):
    """What the events topic holds: its format, where its schemas are, and what reports are made of.

    Tables that can't be right are refused when an instance is made.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, populate_by_name=True, extra="forbid")

    events_format: EventsFormat = Field(
        default="json",
        description="what records hold: JSON, and what a schema registry's serializers write, or an OpenTelemetry "
        "Collector's metrics",
    )
    mapping: Annotated[MappingConfig | None, NoDecode] = Field(
        default=None, description="where id, entries and times are in records of other programs; unset: our own reports"
    )
    otlp: Annotated[OtlpConfig | None, NoDecode] = Field(
        default=None, description="which attributes of OpenTelemetry are the id and the keys; unset: as documented"
    )

    @field_validator("mapping", "otlp", mode="before")
    @classmethod
    def _from_environment(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value) if value else None
        except ValueError:
            raise ValueError(_NO_TABLE) from None

    def require_own_reports(self, what: str, *, advice: str = "give our own reports a topic of their own") -> None:
        """Refuse to write our own reports to a topic whose records are read as something else.

        Raises:
            ConfigError: they are; `what`, such as "the bridge produces reports", begins the message.
        """
        if self.mapping is not None or self.events_format != "json":
            setting = "MAPPING" if self.mapping is not None else f"EVENTS_FORMAT={self.events_format}"
            raise ConfigError(
                f"{what} in our own format, and {_PREFIX}{setting} says that the events topic holds another: {advice}"
            )

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        is_otlp = self.events_format != "json"
        if self.mapping is not None and is_otlp:
            raise ValueError(f"mapping is for AGENT_METADATA_EVENTS_FORMAT=json, and it is {self.events_format}")
        if self.otlp is not None and not is_otlp:
            raise ValueError("otlp needs AGENT_METADATA_EVENTS_FORMAT=otlp_json or otlp_proto")
        return self


def table_complaint(item: Any) -> str | None:
    """Return what pydantic found wrong in a table, with the field's name; None if it is not about a table."""
    table, *fields = item["loc"]
    if table not in _TABLES:
        return None
    if not fields:  # about the table as a whole
        problem = _NO_TABLE if item["type"] == "model_type" else str(item["msg"]).removeprefix("Value error, ")
        shown = "" if isinstance(item["input"], dict) else f"={item['input']!r}"
        return f"{_PREFIX}{table.upper()}{shown}: {problem}"
    name, problem = f"{table}.{fields[0]}", str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{name} is missing"
    if item["type"] == "extra_forbidden":
        return f"{name} is not a setting; those of [{table}] are {', '.join(_TABLES[table].model_fields)}"
    return f"{name} = {item['input']!r}: {problem[:1].lower()}{problem[1:]}"
