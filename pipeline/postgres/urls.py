"""Settings for reaching Postgres: whose table is written, where listeners connect, and what the bridge reads."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, Field, SecretStr, field_validator


class PostgresUrls(BaseModel):
    """URLs of databases; all are secret, as they may hold passwords."""

    database_url: SecretStr = Field(
        default=SecretStr("postgresql://localhost/agent_metadata"),
        validation_alias="DATABASE_URL",
        description="postgresql:// URL of the database that holds workspace_agent_metadata",
    )
    database_listen_url: SecretStr | None = Field(
        default=None,
        validation_alias="DATABASE_LISTEN_URL",
        description="for listeners, where DATABASE_URL goes through a pool that can't LISTEN; unset: DATABASE_URL",
    )
    bridge_database_url: SecretStr | None = Field(
        default=None, description="coder's database, for `bridge`: the table that coder's own batcher writes"
    )
    bridge_poll_seconds: float = Field(
        default=5.0, ge=0.1, le=3600, description="how often `bridge` looks through that table for changed rows"
    )

    @field_validator("database_url", "database_listen_url", "bridge_database_url")
    @classmethod
    def _is_postgres_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must start with postgresql://")
        if value is not None:
            _refuse_missing_files(value.get_secret_value())
        return value

    def listener_url(self) -> tuple[str, str]:
        """Return the database URL for listeners, and the name of the setting that it comes from."""
        if self.database_listen_url:
            return self.database_listen_url.get_secret_value(), "DATABASE_LISTEN_URL"
        return self.database_url.get_secret_value(), "DATABASE_URL"


def _refuse_missing_files(url: str) -> None:
    try:
        parameters = dict(parse_qsl(urlsplit(url).query))
    except ValueError:
        return  # asyncpg explains it better
    for name in ("sslrootcert", "sslcert", "sslkey"):
        if name in parameters and not Path(parameters[name]).is_file():
            raise ValueError(f"{name}={parameters[name]}: there is no such file")
