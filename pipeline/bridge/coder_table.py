"""A connection to the table that coder's own batcher writes: what changed since a look, and whom coder has notified."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

import asyncpg
import structlog

from pipeline.core.notify import NOTIFY_CHANNEL, decode_agent_ids
from pipeline.errors import ConfigError, DecodeError, ServiceUnavailable
from pipeline.postgres.connections import Connection, connect, connected
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.statements import fetch_one, statement

URL_SETTING: Final = "AGENT_METADATA_BRIDGE_DATABASE_URL"
# As a horizon: everything in the table.
EVERYTHING: Final = 0
# A look through a million rows takes a second or two; a connection that was cut silently gives no answer at all.
_ANSWER_SECONDS: Final = 60.0
# Notified agents that wait to be read. Beyond these it is simpler to wait for the next look through the table.
_MOST_NOTIFIED: Final = 100_000

_log = structlog.get_logger(__name__)


class CoderRow(NamedTuple):
    """A pair as coder's batcher left it, and the id of the transaction that wrote it."""

    agent_id: uuid.UUID
    key: str
    value: str
    error: str
    collected_at: datetime
    transaction_id: int


class CoderTable:
    """Reads the table through one connection; make it by `opened`.

    A horizon is the id of a transaction: rows "since" it were written by that transaction or a newer one. It has a
    meaning within one connection only: behind the next one there may be another server, or the table from a backup.
    """

    def __init__(self, connection: asyncpg.Connection) -> None:
        """Wrap an open connection; it is not listening yet."""
        self._connection = connection
        self._notified: dict[uuid.UUID, None] = {}  # a set in order
        self._wake = asyncio.Event()
        self._is_cut = False

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, database_url: str) -> AsyncIterator[CoderTable]:
        """Connect and listen to coder's notifications, of which there are none where its pubsub is NATS.

        Raises:
            ServiceUnavailable: the database can't be reached.
            ConfigError: it refuses us, or has no such table.
        """
        connection = await connect(database_url, URL_SETTING)
        try:
            table = cls(connection)
            connection.add_termination_listener(table._on_cut)
            async with _answered("looking for coder's table"):
                await connection.add_listener(NOTIFY_CHANNEL, table._on_notify)
                if await connection.fetchval("select to_regclass('workspace_agent_metadata')") is None:
                    raise ConfigError(
                        f"there is no workspace_agent_metadata where {URL_SETTING} leads to, or this user has no USAGE "
                        "on its schema: name coder's own database, and if need be its schema by ?search_path=NAME"
                    )
            yield table
        finally:
            connection.terminate()

    async def horizon(self) -> int:
        """Return a horizon such that what is read from now on misses nothing that will be "since" it."""
        async with _answered("reading the horizon"):
            found: int = await self._connection.fetchval(statement("bridge_horizon"))
        return found

    async def changed_agents(self, horizon: int) -> Sequence[uuid.UUID]:
        """Return the agents that have rows since the horizon; it reads the whole table."""
        async with _answered("looking for changed rows"):
            return [row[0] for row in await self._connection.fetch(statement("bridge_agents"), horizon)]

    async def rows(self, agent_ids: Sequence[uuid.UUID], horizon: int) -> list[CoderRow]:
        """Return these agents' rows since the horizon, ordered by agent and key."""
        async with _answered("reading changed rows"):
            found = await self._connection.fetch(statement("bridge_rows"), list(agent_ids), horizon)
        return [CoderRow(*row) for row in found]

    async def notified(self, wait_seconds: float) -> list[uuid.UUID]:
        """Return the agents that coder notifies of, each once; none if it does not for so long.

        Raises:
            ServiceUnavailable: the connection was closed.
        """
        with contextlib.suppress(TimeoutError):
            # Not wait_for: Python 3.11's loses a cancellation that comes together with the event.
            async with asyncio.timeout(wait_seconds):
                await self._wake.wait()
        if self._is_cut:
            raise ServiceUnavailable("the connection to coder's database was closed")
        self._wake.clear()
        notified = list(self._notified)
        self._notified.clear()
        return notified

    def _on_notify(self, _connection: Connection, _pid: int, _channel: str, payload: object) -> None:
        try:
            agent_ids = decode_agent_ids(str(payload))
        except DecodeError as error:
            _log.warning("notify_ignored", error=str(error))
            return
        if len(self._notified) < _MOST_NOTIFIED:
            self._notified.update(dict.fromkeys(agent_ids))
        self._wake.set()

    def _on_cut(self, _connection: Connection) -> None:
        self._is_cut = True
        self._wake.set()


async def require_another_table(source_url: str, target_url: str) -> None:
    """Refuse to read the table that the pipeline itself writes: it would be compared with itself.

    Guarantee: it is recognised by whatever address, name or pooler the two URLs lead there.

    Raises:
        ConfigError: both URLs lead to the same table.
        ServiceUnavailable: one of the databases can't be reached.
    """
    number = secrets.randbits(63)
    source = await connect(source_url, URL_SETTING)
    try:
        async with translated_errors("looking at coder's table", URL_SETTING), source.transaction():
            ours = await fetch_one(source, statement("bridge_table"), number)
            async with connected(target_url) as target:
                theirs = await fetch_one(target, statement("bridge_table"), number)
    finally:
        await source.close()
    if not theirs["is_locked"] and ours["table_oid"] is not None and ours["table_oid"] == theirs["table_oid"]:
        raise ConfigError(
            f"{URL_SETTING} and DATABASE_URL lead to the same table: the pipeline has to write another one, "
            "for example in a schema of its own (?search_path=shadow); see docs/coder.md"
        )


@contextlib.asynccontextmanager
async def _answered(activity: str) -> AsyncIterator[None]:
    """Wait for Postgres's answer, with its errors translated."""
    async with translated_errors(activity, URL_SETTING), asyncio.timeout(_ANSWER_SECONDS):
        yield
