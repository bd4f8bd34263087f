"""MetadataListener: LISTEN, then a snapshot, then rows as NOTIFY names them; the same after each lost connection."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from typing import Final, NamedTuple

import asyncpg
import structlog
import tenacity
from prometheus_client import CollectorRegistry

from pipeline.core.notify import NOTIFY_CHANNEL, decode_agent_ids
from pipeline.core.report import timestamp_us
from pipeline.errors import DecodeError, ServiceUnavailable
from pipeline.monitoring.metrics import ListenerMetrics
from pipeline.postgres.connections import Connection, connect
from pipeline.postgres.errors import CONNECTION_ERRORS
from pipeline.postgres.store import read_rows

_FIRST_BACKOFF_SECONDS: Final = 0.1
_LONGEST_BACKOFF_SECONDS: Final = 5.0
# A connection that is cut silently (a firewall, a pulled cable) is noticed by a query that gets no answer.
_KEEPALIVE_SECONDS: Final = 15.0
# Without our own limit the kernel would retransmit for a quarter of an hour before it reports an error.
_ANSWER_SECONDS: Final = 30.0

_log = structlog.get_logger(__name__)


class Change(NamedTuple):
    """A row as it is now.

    `notified_at` is when the NOTIFY that led here arrived, in seconds since the Unix epoch; None for a row that was
    read in a snapshot.
    """

    agent_id: uuid.UUID
    key: str
    value: str
    error: str
    collected_at: datetime
    notified_at: float | None


class MetadataListener:
    """Yields rows as they change, of some agents or of all.

    Guarantee: no final value is missed. Subscription comes before the snapshot, and after a cut everything watched
    is read again; a row is not yielded twice with the same contents.
    """

    def __init__(
        self,
        database_url: str,
        agent_ids: Iterable[uuid.UUID] | None = None,
        *,
        registry: CollectorRegistry | None = None,
        url_setting: str = "DATABASE_URL",
    ) -> None:
        """Make a listener of some agents, or of all (None); it connects when `changes` is iterated.

        The URL must point to Postgres, or to a pooler in session mode: in transaction mode LISTEN receives nothing.
        `registry` takes its metrics; `url_setting` is what errors name instead of the URL.
        """
        self._metrics = ListenerMetrics(registry or CollectorRegistry())
        self.freshness = self._metrics.freshness
        self._database_url = database_url
        self._url_setting = url_setting
        self._agent_ids = None if agent_ids is None else frozenset(agent_ids)
        self._yielded: dict[tuple[uuid.UUID, str], tuple[str, str, datetime]] = {}
        self._notified_at: dict[uuid.UUID, float] = {}  # of agents whose rows are to be read
        self._wake = asyncio.Event()
        self._is_cut = False
        self.is_following = False
        """Whether everything watched was read since the last cut, and changes are received."""

    async def changes(self) -> AsyncIterator[Change]:
        """Iterate changes until cancelled, starting with a snapshot and reconnecting as often as it takes.

        Raises:
            ConfigError: the URL is malformed, or the database refuses us.
            SchemaMismatch: the table is missing.
        """
        while True:
            connection = await self._reconnect()
            try:
                async for change in self._follow(connection):
                    yield change
            except ServiceUnavailable as error:
                self._metrics.cuts.inc()
                _log.warning("listener_cut", error=str(error), advice="reconnecting, then reading what was missed")
            finally:
                self.is_following = False
                connection.terminate()

    async def _reconnect(self) -> asyncpg.Connection:
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ServiceUnavailable),
            wait=tenacity.wait_random_exponential(_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS),
        ):
            with attempt:
                return await self._subscribe()
        raise AssertionError("unreachable: retried forever")

    async def _subscribe(self) -> asyncpg.Connection:
        connection = await connect(self._database_url, self._url_setting)
        self._is_cut = False
        self._notified_at.clear()
        connection.add_termination_listener(self._on_cut)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await connection.add_listener(NOTIFY_CHANNEL, self._on_notify)
        except (asyncpg.PostgresError, *CONNECTION_ERRORS) as error:
            connection.terminate()
            raise ServiceUnavailable(f"LISTEN failed: {error}") from error
        return connection

    async def _follow(self, connection: asyncpg.Connection) -> AsyncIterator[Change]:
        for change in await self._read(connection, self._agent_ids, {}):
            yield change
        self.is_following = True
        while True:
            try:
                # Not wait_for: Python 3.11's loses a cancellation that comes together with the event.
                async with asyncio.timeout(_KEEPALIVE_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                await self._read(connection, [], {})
            if self._is_cut:
                raise ServiceUnavailable("the connection was closed")
            self._wake.clear()
            notified_at, self._notified_at = self._notified_at, {}
            if notified_at:
                for change in await self._read(connection, list(notified_at), notified_at):
                    yield change

    async def _read(
        self, connection: asyncpg.Connection, agent_ids: Iterable[uuid.UUID] | None, notified_at: dict[uuid.UUID, float]
    ) -> list[Change]:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                rows = await read_rows(connection, None if agent_ids is None else list(agent_ids))
        except TimeoutError:
            raise ServiceUnavailable(f"Postgres did not answer for {_ANSWER_SECONDS:.0f} s") from None
        changes = []
        for row in rows:
            pair, contents = row[:2], row[2:]
            if self._yielded.get(pair) != contents:
                self._yielded[pair] = contents
                changes.append(Change(*row, notified_at.get(row.agent_id)))
        self._observe(changes)
        return changes

    def _observe(self, changes: list[Change]) -> None:
        if changes and (notified_at := changes[-1].notified_at) is not None:
            collected_at = timestamp_us(changes[-1].collected_at) / 1e6
            self._metrics.freshness.observe("notified", collected_at=collected_at, at=notified_at)

    def _on_notify(self, _connection: Connection, _pid: int, _channel: str, payload: object) -> None:
        now = time.time()
        self._metrics.payloads.inc()
        try:
            agent_ids = decode_agent_ids(str(payload))
        except DecodeError as error:
            self._metrics.ignored_payloads.inc()
            _log.warning("notify_ignored", error=str(error))
            return
        for agent_id in agent_ids:
            if self._agent_ids is None or agent_id in self._agent_ids:
                self._notified_at[agent_id] = now
        self._wake.set()

    def _on_cut(self, _connection: Connection) -> None:
        self._is_cut = True
        self._wake.set()
