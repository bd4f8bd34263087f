"""Connections to the database by the settings: for a command, and for a listener."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any
from uuid import UUID

import asyncpg
from prometheus_client import CollectorRegistry

from pipeline.errors import ConfigError
from pipeline.listener import MetadataListener
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.pooling import leads_through_pool, shares_servers
from pipeline.postgres.store import CONNECT_TIMEOUT_SECONDS, read_rows
from pipeline.settings import Settings


@contextlib.asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[Any]:
    """Open one connection to the database and one transaction on it, for a command: also through a pool.

    Raises:
        ServiceUnavailable, ConfigError: it can't be reached, or refuses us.
    """
    connection = await connect(settings)
    transaction = connection.transaction()
    try:
        async with translated_errors("beginning"):
            await transaction.start()
        yield connection
        async with translated_errors("committing"):
            await transaction.commit()
    finally:
        await connection.close()  # which undoes what is not committed


async def connect(settings: Settings, *, to_listen: bool = False) -> Any:
    """Open one connection to the database, by DATABASE_LISTEN_URL if it is to LISTEN; the caller closes it.

    Raises:
        ServiceUnavailable, ConfigError: it can't be reached, or refuses us, or its URL is none.
    """
    variable, url = "DATABASE_URL", settings.database_url
    if to_listen and settings.database_listen_url:
        variable, url = "DATABASE_LISTEN_URL", settings.database_listen_url
    async with translated_errors("connecting", variable):
        try:
            return await asyncpg.connect(
                url.get_secret_value(), timeout=CONNECT_TIMEOUT_SECONDS, statement_cache_size=0
            )
        except ValueError as error:
            if isinstance(error, OSError):
                raise  # about a certificate
            # Only asyncpg's own words: Python's may quote a part of the password.
            said = str(error) if isinstance(error, asyncpg.InterfaceError) else type(error).__name__
            raise ConfigError(
                f"{variable} is no URL of a Postgres (postgresql://user@host:port/database): {said}"
            ) from None


async def require_sessions(settings: Settings) -> None:
    """Check that a listener hears what is notified: not through a pool that lends connections by transaction.

    Raises:
        ConfigError: it would hear nothing.
        ServiceUnavailable: the database can't be reached.
    """
    async with contextlib.AsyncExitStack() as stack:
        one = await connect(settings, to_listen=True)
        stack.push_async_callback(one.close)
        async with translated_errors("looking for a pool"):
            if not await leads_through_pool(one):
                return
            other = await connect(settings, to_listen=True)
            stack.push_async_callback(other.close)
            is_shared = await shares_servers(one, other)
    if is_shared:
        variable = "DATABASE_LISTEN_URL" if settings.database_listen_url else "DATABASE_URL"
        raise ConfigError(
            f"{variable} leads through a pool that lends connections by transaction, where LISTEN hears nothing: "
            "set DATABASE_LISTEN_URL to the server itself, or to a pool by sessions"
        )


def listener(
    settings: Settings, agent_ids: Iterable[UUID] | None, registry: CollectorRegistry | None = None
) -> MetadataListener:
    """Make a listener of some agents, or of all (None)."""
    return MetadataListener(lambda: connect(settings, to_listen=True), read_rows, agent_ids, registry=registry)
