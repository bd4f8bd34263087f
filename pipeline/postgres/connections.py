"""Connections to a database, by URL: one or a pool of them, straight to Postgres or through a pooler such as PgBouncer.

A pooler in transaction mode may run each transaction in another server process, which has three consequences. Prepared
statements don't outlive their transaction, so connections keep none. Session settings and locks would be left to
another client, so those of a write end with its transaction. A listener would receive nothing: `require_sessions`
refuses it.

`url_setting` is the setting that a URL comes from: messages name it, and never show the URL, which holds a password.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final, TypeAlias

import asyncpg
import structlog
from asyncpg.pool import PoolConnectionProxy

from pipeline.errors import ConfigError
from pipeline.postgres.errors import translated_errors

CONNECT_TIMEOUT_SECONDS: Final = 10.0
_STATEMENT_CACHE_SIZE: Final = 100  # asyncpg's own default; we have fewer statements

# One of our own, or one lent by a pool.
Connection: TypeAlias = asyncpg.Connection | PoolConnectionProxy

_log = structlog.get_logger(__name__)


async def connect(database_url: str, url_setting: str = "DATABASE_URL") -> asyncpg.Connection:
    """Open one connection, which works through a pooler too; the caller closes it.

    Raises:
        ServiceUnavailable: the database can't be reached.
        ConfigError: it refuses us, or the URL is malformed.
    """
    async with translated_errors("connecting", url_setting):
        try:
            return await asyncpg.connect(database_url, timeout=CONNECT_TIMEOUT_SECONDS, statement_cache_size=0)
        except ValueError as error:
            if isinstance(error, OSError):
                raise  # about a certificate
            # Only asyncpg's own words: Python's may quote a part of the password.
            reason = str(error) if isinstance(error, asyncpg.InterfaceError) else type(error).__name__
            raise ConfigError(
                f"{url_setting} is not a Postgres URL (postgresql://user@host:port/database): {reason}"
            ) from None


@contextlib.asynccontextmanager
async def connected(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Open one connection and one transaction on it; commit and close at the end of the block.

    Raises:
        ServiceUnavailable, ConfigError: as `connect`; or the commit failed.
    """
    connection = await connect(database_url)
    transaction = connection.transaction()
    try:
        async with translated_errors("beginning"):
            await transaction.start()
        yield connection
        async with translated_errors("committing"):
            await transaction.commit()
    finally:
        await connection.close()  # which rolls back what is not committed


async def open_pool(
    database_url: str,
    *,
    application_name: str,
    max_size: int,
    command_timeout_seconds: float,
    min_size: int = 1,
) -> asyncpg.Pool:
    """Open a pool of connections that keep prepared statements, unless a pooler is in between; the caller closes it.

    Raises:
        ServiceUnavailable, ConfigError: as `connect`.
    """
    statement_cache_size = await _statement_cache_size(database_url)
    async with translated_errors("connecting"):
        return await asyncpg.create_pool(
            database_url,
            min_size=min_size,
            max_size=max_size,
            timeout=CONNECT_TIMEOUT_SECONDS,
            command_timeout=command_timeout_seconds,
            server_settings={"application_name": application_name},
            statement_cache_size=statement_cache_size,
        )


async def require_sessions(
    database_url: str, url_setting: str = "DATABASE_URL", listen_setting: str = "DATABASE_LISTEN_URL"
) -> None:
    """Check that LISTEN works: that no pooler in transaction mode is in between; `listen_setting` is the way round one.

    Raises:
        ConfigError: one is, and a listener would receive nothing; or as `connect`.
        ServiceUnavailable: the database can't be reached.
    """
    async with contextlib.AsyncExitStack() as stack:
        one = await connect(database_url, url_setting)
        stack.push_async_callback(one.close)
        async with translated_errors("looking for a pooler", url_setting):
            if not await _is_pooled(one):
                return
            other = await connect(database_url, url_setting)
            stack.push_async_callback(other.close)
            is_shared = await _share_servers(one, other)
    if is_shared:
        raise ConfigError(
            f"{url_setting} goes through a connection pooler in transaction mode, where LISTEN receives nothing: "
            f"set {listen_setting} to the server itself, or to a pooler in session mode"
        )


async def _statement_cache_size(database_url: str) -> int:
    connection = await connect(database_url)
    try:
        async with translated_errors("looking for a pooler"):
            if not await _is_pooled(connection):
                return _STATEMENT_CACHE_SIZE
    finally:
        await connection.close()
    _log.info("database_is_pooled", consequence="each transaction prepares its statements again")
    return 0


async def _is_pooled(connection: asyncpg.Connection) -> bool:
    """Tell whether the server process differs from the one that the start of the connection announced.

    A pooler answers the start itself, with a number of its own.
    """
    return connection.get_server_pid() != await _server_pid(connection)


async def _share_servers(one: asyncpg.Connection, other: asyncpg.Connection) -> bool:
    """Tell whether two open connections get their server processes by transaction, from one pooler.

    Never true of a pooler in session mode, where each connection keeps a process of its own. Asked in the order one,
    other, other, one, so that either way of choosing among idle processes shows: last used first, or in turn.
    """
    pids = [await _server_pid(connection) for connection in (one, other, other, one)]
    return pids[0] != pids[3] or pids[1] != pids[2] or pids[0] == pids[1]


async def _server_pid(connection: asyncpg.Connection) -> int:
    async with connection.transaction():  # otherwise a pooler may give a statement's halves to two processes
        pid: int = await connection.fetchval("select pg_backend_pid()")
    return pid
