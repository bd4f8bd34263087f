"""Settings: environment variables over a TOML file over defaults, checked before anything starts."""

from __future__ import annotations

import logging
import os
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, TomlConfigSettingsSource

from pipeline.checks import secret_text, token_problem
from pipeline.core.replication import Replication
from pipeline.environment import nearest, refuse_misnamed, service_links
from pipeline.errors import ConfigError
from pipeline.formats.settings import FormatSettings, table_complaint
from pipeline.kafka.security import PREFIX as PREFIX  # it is the prefix of all settings: exported from here too
from pipeline.kafka.security import KafkaSecurity
from pipeline.kafka.topics import TopicSpec, load_topic_specs
from pipeline.postgres.urls import PostgresUrls

CONFIG_FILE_VARIABLE: Final = "AGENT_METADATA_CONFIG_FILE"
# How long a role that is stopped may take to write what it holds. Source: metadatabatcher's final flush.
SHUTDOWN_SECONDS: Final = 15.0
# Source: Kafka's org.apache.kafka.common.internals.Topic.
_TOPIC_NAME: Final = r"^[a-zA-Z0-9._-]{1,249}$"
_AUTO_OR_NUMBER: Final = r"^(auto|[1-9][0-9]?)$"
_ORIGINS: Final = r"^(https?://[^/,\s]+(,\s*https?://[^/,\s]+)*)?$"
_IN_WORDS: Final = {
    _TOPIC_NAME: "must be 1 to 249 letters, digits, '.', '_' or '-'",
    _AUTO_OR_NUMBER: "must be auto, or a whole number from 1 to 99",
    _ORIGINS: "must be origins such as https://example.org, comma separated",
}

_log = logging.getLogger(__name__)


class Settings(PostgresUrls, KafkaSecurity, FormatSettings):
    """What an operator may set; a field's environment variable is AGENT_METADATA_ and its name in capitals.

    KAFKA_BOOTSTRAP_SERVERS, DATABASE_URL and DATABASE_LISTEN_URL are shared with other programs and carry no prefix.
    In the TOML file that AGENT_METADATA_CONFIG_FILE names, settings have the names of the fields.
    """

    events_topic: str = Field(default="agent-metadata.events.v1", pattern=_TOPIC_NAME, description="reports of agents")
    batches_topic: str = Field(
        default="agent-metadata.batches.v1", pattern=_TOPIC_NAME, description="closed windows, for sinks"
    )
    dead_letter_topic: str = Field(
        default="agent-metadata.dead-letter.v1",
        pattern=_TOPIC_NAME,
        description="records that could not be used, with the reason",
    )
    consumer_group: str = Field(
        default="agent-metadata", min_length=1, description="prefix of the groups -worker and -sink"
    )
    partitions: int = Field(default=8, ge=1, le=1024, description="of the events topic and of the batches topic")
    topic_replication: str = Field(
        default="auto",
        pattern=_AUTO_OR_NUMBER,
        coerce_numbers_to_str=True,
        description="replicas of a topic that is created; auto: 3 on three brokers or more, else the brokers' default",
    )
    topic_min_insync_replicas: str = Field(
        default="auto",
        pattern=_AUTO_OR_NUMBER,
        coerce_numbers_to_str=True,
        description="replicas that must have a record when it is acknowledged; auto: 2 of 3, else the brokers' default",
    )
    window_seconds: float = Field(
        default=5.0, ge=0.1, le=3600, description="length of a tumbling window; metadatabatcher's interval is 5 s"
    )
    batch_size: int = Field(default=500, ge=1, le=10_000, description="most rows per batch; metadatabatcher's is 500")
    window_capacity: int = Field(
        default=50_000,
        ge=1,
        le=5_000_000,
        description="unique (agent, key) pairs at which a partition's window closes early: the bound on memory; "
        "set it to the batch size for metadatabatcher's behaviour",
    )
    open_windows_bytes: int = Field(
        default=134_217_728,
        ge=1_048_576,
        le=1_073_741_824,
        description="bytes of large reports that a worker's open windows may hold together; at its share of it, a "
        "partition's window closes early",
    )
    undeclared: Literal["insert", "ignore"] = Field(
        default="insert", description="a pair without a row is inserted, or ignored (metadatabatcher)"
    )
    notify: Literal["on", "off"] = Field(
        default="on", description="on: NOTIFY listeners of changed rows; off: for backfills that nobody watches"
    )
    unlogged: bool = Field(default=False, description="an UNLOGGED table: less WAL, but a crash of Postgres empties it")
    max_clock_skew_seconds: float = Field(
        default=60.0, ge=0, le=86_400, description="how far ahead of the broker's clock an agent's may be"
    )
    session_timeout_seconds: float = Field(
        default=10.0, ge=1, le=300, description="time after which the partitions of a silent worker or sink move"
    )
    stuck_seconds: float = Field(
        default=120.0,
        ge=15,
        le=3600,
        description="how long the event loop may stand still, or records wait unread although Kafka answers, before "
        "/live fails and the process ends to be restarted; three times Kafka's 40 s request timeout",
    )
    metrics_port: int = Field(default=0, ge=0, le=65_535, description="port of /metrics; 0 = off")
    metrics_prefix: Literal["agent_metadata_", "coderd_agentapi_metadata_"] = Field(
        default="agent_metadata_", description="prefix of metadatabatcher's seven metrics; the second is coder's own"
    )
    serve_host: str = Field(
        default="127.0.0.1", min_length=1, description="address that `serve` listens on; 0.0.0.0: all"
    )
    serve_port: int = Field(
        default=8080, ge=0, le=65_535, description="port of the API and the live page; 0 = any free one"
    )
    serve_max_pairs: int = Field(
        default=1_000_000, ge=1, le=100_000_000, description="pairs that `serve` holds; further ones are left out"
    )
    serve_token: SecretStr | None = Field(
        default=None, description="bearer token that the API requires; unset or empty: none"
    )
    serve_reports_token: SecretStr | None = Field(
        default=None, description="bearer token that POST /reports requires; unset or empty: it is off"
    )
    serve_cors_origins: str = Field(
        default="",
        pattern=_ORIGINS,
        description="origins (https://host) whose pages may read the API, comma separated; empty: its own page's only",
    )
    log_format: Literal["console", "json"] = Field(default="console", description="format of the log on stderr")

    @field_validator("serve_token", "serve_reports_token")
    @classmethod
    def _is_token(cls, value: SecretStr | None) -> SecretStr | None:
        token = secret_text(value)
        if problem := token_problem(token):
            raise ValueError(problem)
        return value if token else None

    @model_validator(mode="after")
    def _topics_fit(self) -> Settings:
        if len(set(self.topic_names.values())) < len(self.topic_names):
            raise ValueError("EVENTS_TOPIC, BATCHES_TOPIC and DEAD_LETTER_TOPIC must be three different topics")
        self._replication.check()
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources by precedence: the command line, the environment, the file."""
        if isinstance(env_settings, EnvSettingsSource):
            links = {name.lower() for name in service_links(os.environ)}
            env_settings.env_vars = {name: text for name, text in env_settings.env_vars.items() if name not in links}
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _config_file())

    @property
    def worker_group(self) -> str:
        """The worker's consumer group, which is also the Faust app's id."""
        return f"{self.consumer_group}-worker"

    @property
    def sink_group(self) -> str:
        """The sink's consumer group."""
        return f"{self.consumer_group}-sink"

    @property
    def topic_names(self) -> dict[str, str]:
        """The topics by role, as `topics/` declares them."""
        return {
            "events": self.events_topic,
            "batches": self.batches_topic,
            "dead_letter": self.dead_letter_topic,
        }

    def declared_topics(self) -> dict[str, TopicSpec]:
        """Return the topics by role as `topics/` declares them, with the names, partitions and replication set here."""
        return load_topic_specs(names=self.topic_names, partitions=self.partitions, replication=self._replication)

    @property
    def _replication(self) -> Replication:
        texts = (self.topic_replication, self.topic_min_insync_replicas)
        return Replication(*(None if text == "auto" else int(text) for text in texts))

    @property
    def max_clock_skew(self) -> timedelta:
        """`max_clock_skew_seconds`, typed."""
        return timedelta(seconds=self.max_clock_skew_seconds)


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides`, unless None, take precedence over the environment, and that over the file.

    Raises:
        ConfigError: names each wrong setting, its value (unless secret) and what is allowed.
    """
    refuse_misnamed(os.environ, [*map(_variable, Settings.model_fields), CONFIG_FILE_VARIABLE])
    if links := service_links(os.environ):
        _log.debug("ignored what Kubernetes injects for a Service: %s", ", ".join(links))
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise ConfigError("; ".join(_complaint(item) for item in error.errors())) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{_config_file()} is not TOML: {error}") from None


def describe_settings(settings: Settings) -> list[tuple[str, str, str]]:
    """List each setting as (variable, value, origin), the origin being where its value is from; secrets are masked."""
    file = _config_file()
    in_file = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    described, in_environment = [], set(os.environ) - set(service_links(os.environ))
    for name in Settings.model_fields:
        variable, value = _variable(name), getattr(settings, name)
        origin = "environment" if variable in in_environment else str(file) if name in in_file else "default"
        described.append((variable, "" if value is None else str(value), origin))
    return described


def _config_file() -> Path | None:
    name = os.environ.get(CONFIG_FILE_VARIABLE)
    if name and not Path(name).is_file():
        raise ConfigError(f"{CONFIG_FILE_VARIABLE}={name}: there is no such file")
    return Path(name) if name else None


def _variable(name: str) -> str:
    return str(Settings.model_fields[name].validation_alias or PREFIX + name.upper())


def _complaint(item: Any) -> str:
    problem = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:  # about several settings
        return str(problem)
    if complaint := table_complaint(item):
        return complaint
    name = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        return f"{name} is not a setting{nearest(name, Settings.model_fields)}"
    variable = _variable(name) if name in Settings.model_fields else name
    shown = "" if re.search("url|password|secret|token", name.lower()) else f"={item['input']!r}"
    if item["type"] != "value_error":
        problem = _allowed(name) or problem
    return f"{variable}{shown}: {problem[0].lower()}{problem[1:]}"


def _allowed(name: str) -> str | None:
    """Say what a setting allows where pydantic's message is incomplete, or a pattern; None where it will do."""
    field = Settings.model_fields[name]
    limits = {limit: getattr(rule, limit) for rule in field.metadata for limit in ("ge", "le") if hasattr(rule, limit)}
    if limits:
        kind = "whole number" if field.annotation is int else "number"
        return f"must be a {kind} from {limits['ge']:.10g} to {limits['le']:.10g}"
    if field.annotation is bool:
        return "must be true or false"
    return next((_IN_WORDS[rule.pattern] for rule in field.metadata if getattr(rule, "pattern", None)), None)
