"""MetadataListener: LISTEN, then a snapshot, then rows as NOTIFY names them; the same after each lost connection."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from datetime import datetime
from itertools import islice, takewhile
from typing import Final, NamedTuple, TypeVar

import asyncpg
import structlog
import tenacity
from prometheus_client import CollectorRegistry

from pipeline.core.notify import NOTIFY_CHANNEL, decode_agent_ids
from pipeline.core.report import agent_uuid, timestamp_us
from pipeline.errors import DecodeError, ServiceUnavailable
from pipeline.monitoring.metrics import ListenerMetrics
from pipeline.postgres.connections import Connection, connect
from pipeline.postgres.errors import CONNECTION_ERRORS
from pipeline.postgres.rows import TableRow, read_all_rows, read_rows

_FIRST_BACKOFF_SECONDS: Final = 0.1
_LONGEST_BACKOFF_SECONDS: Final = 5.0
# A connection that is cut silently (a firewall, a pulled cable) is noticed by a query that gets no answer.
_KEEPALIVE_SECONDS: Final = 15.0
# Without our own limit the kernel would retransmit for a quarter of an hour before it reports an error.
_ANSWER_SECONDS: Final = 30.0
# Agents whose rows are read by one statement; they take about 10 ms.
_AGENTS_PER_READ: Final = 1000
# Notified agents that wait to be read. Beyond these, at about 150 bytes each, it is simpler to read all rows again.
_MOST_NOTIFIED: Final = 100_000
_NOT_NOTIFIED: Final[Mapping[uuid.UUID, float]] = {}

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class Change(NamedTuple):
    """A row as it is now.

    `notified_at` is when the NOTIFY that led here arrived, in seconds since the Unix epoch; None for a row that was
    read in a snapshot. `name` is what the agent calls itself, if that is no UUID.
    """

    agent_id: uuid.UUID
    key: str
    value: str
    error: str
    collected_at: datetime
    notified_at: float | None
    name: str | None = None


class MetadataListener:
    """Yields rows as they change, of some agents or of all.

    Guarantee: no final value is missed. Subscription comes before the snapshot, and after a cut everything watched
    is read again; a row is not yielded twice with the same contents. Without deduplication it may be, but then memory
    does not grow with the number of pairs.
    """

    def __init__(
        self,
        database_url: str,
        agent_ids: Iterable[uuid.UUID | str] | None = None,
        *,
        registry: CollectorRegistry | None = None,
        url_setting: str = "DATABASE_URL",
        deduplicate: bool = True,
    ) -> None:
        """Make a listener of some agents, by UUID or name, or of all (None); it connects when `changes` is iterated.

        The URL must point to Postgres, or to a pooler in session mode: in transaction mode LISTEN receives nothing.
        `registry` takes its metrics; `url_setting` is what errors name instead of the URL. `deduplicate=False` is for
        a caller that holds the rows itself.

        Raises:
            ValueError: an agent's name is empty, or too long.
        """
        self._metrics = ListenerMetrics(registry or CollectorRegistry())
        self.freshness = self._metrics.freshness
        self._database_url = database_url
        self._url_setting = url_setting
        self._agent_ids = None if agent_ids is None else frozenset(map(_uuid, agent_ids))
        self._yielded: dict[tuple[uuid.UUID, str], tuple[str, str, datetime]] | None = {} if deduplicate else None
        self._notified_at: dict[uuid.UUID, float] = {}  # of agents whose rows are to be read
        self._is_behind = False  # too many: all rows are to be read
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
        self._is_cut = self._is_behind = False
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
        async for change in self._read_all(connection):
            yield change
        self.is_following = True
        while True:
            try:
                # Not wait_for: Python 3.11's loses a cancellation that comes together with the event.
                async with asyncio.timeout(_KEEPALIVE_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                await _answered(read_rows(connection, []))
            if self._is_cut:
                raise ServiceUnavailable("the connection was closed")
            self._wake.clear()
            if self._is_behind:
                self._is_behind = False
                async for change in self._read_all(connection):
                    yield change
            while notified_at := dict(islice(self._notified_at.items(), _AGENTS_PER_READ)):
                for agent_id in notified_at:
                    del self._notified_at[agent_id]
                for change in self._changed(await _answered(read_rows(connection, list(notified_at))), notified_at):
                    yield change

    async def _read_all(self, connection: asyncpg.Connection) -> AsyncIterator[Change]:
        """Read everything watched, in parts."""
        if self._agent_ids is None:
            parts = read_all_rows(connection)
            while (rows := await _answered(anext(parts, None))) is not None:
                for change in self._changed(rows):
                    yield change
            return
        agent_ids = iter(self._agent_ids)
        while some := list(islice(agent_ids, _AGENTS_PER_READ)):
            for change in self._changed(await _answered(read_rows(connection, some))):
                yield change

    def _changed(
        self, rows: Iterable[TableRow], notified_at: Mapping[uuid.UUID, float] = _NOT_NOTIFIED
    ) -> list[Change]:
        """Return what is to be yielded of these rows."""
        changes = []
        for row in rows:
            pair, contents = row[:2], row[2:5]
            if self._yielded is not None:
                if self._yielded.get(pair) == contents:
                    continue
                self._yielded[pair] = contents
            changes.append(Change(*row[:5], notified_at.get(row.agent_id), row.name))
        self._observe(changes)
        return changes

    def _observe(self, changes: list[Change]) -> None:
        """Sample the newest row of the last agent: without deduplication, rows that did not change are among them."""
        if changes and (notified_at := changes[-1].notified_at) is not None:
            of_last = takewhile(lambda change: change.agent_id == changes[-1].agent_id, reversed(changes))
            collected_at = timestamp_us(max(change.collected_at for change in of_last)) / 1e6
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
        if len(self._notified_at) > _MOST_NOTIFIED:
            self._notified_at.clear()
            self._is_behind = True
        self._wake.set()

    def _on_cut(self, _connection: Connection) -> None:
        self._is_cut = True
        self._wake.set()


def _uuid(agent_id: uuid.UUID | str) -> uuid.UUID:
    if isinstance(agent_id, uuid.UUID):
        return agent_id
    try:
        return uuid.UUID(agent_uuid(agent_id))
    except DecodeError as error:
        raise ValueError(str(error)) from None


async def _answered(read: Awaitable[T]) -> T:
    """Wait for Postgres's answer.

    Raises:
        ServiceUnavailable: it gave none for 30 s.
    """
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            return await read
    except TimeoutError:
        raise ServiceUnavailable(f"Postgres did not answer for {_ANSWER_SECONDS:.0f} s") from None
