"""What stands between us and Postgres: a pool such as PgBouncer, and whether it lends connections by transaction."""

from __future__ import annotations

from typing import Any, Final

import asyncpg
import structlog

_KEPT_STATEMENTS: Final = 100  # asyncpg's own default; we have fewer

_log = structlog.get_logger(__name__)


async def statements_to_keep(database_url: str, timeout_seconds: float) -> int:
    """Return how many prepared statements a connection may keep: none where a pool may give it another server process.

    Raises: what asyncpg raises where it can't connect.
    """
    connection = await asyncpg.connect(database_url, timeout=timeout_seconds, statement_cache_size=0)
    try:
        if not await leads_through_pool(connection):
            return _KEPT_STATEMENTS
    finally:
        await connection.close()
    _log.info("database_is_pooled", consequence="statements are prepared in each transaction anew")
    return 0


async def leads_through_pool(connection: Any) -> bool:
    """Tell whether the server's process is another one than the process that the connection was told at its start.

    A pool answers the start itself, with a number of its own.
    """
    told: int = connection.get_server_pid()
    return told != await _server_pid(connection)


async def shares_servers(one: Any, other: Any) -> bool:
    """Tell whether two open connections get their server processes by transaction, from one pool.

    Never true of a pool by sessions, where each connection keeps a process of its own. Asked in the order one, other,
    other, one, so that both of a pool's ways to choose among idle processes show: the last used first, or in turn.
    """
    pids = [await _server_pid(connection) for connection in (one, other, other, one)]
    return pids[0] != pids[3] or pids[1] != pids[2] or pids[0] == pids[1]


async def _server_pid(connection: Any) -> int:
    async with connection.transaction():  # else a pool may give a statement's halves to two processes
        pid: int = await connection.fetchval("select pg_backend_pid()")
    return pid
