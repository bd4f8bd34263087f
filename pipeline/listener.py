"""Listen for changed agents and read their rows: first LISTEN, then a snapshot, then live; anew after each cut."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from typing import Any, Final, NamedTuple

import asyncpg
import structlog
import tenacity
from prometheus_client import CollectorRegistry

from pipeline.core.agent_ids import NOTIFY_CHANNEL, decode_agent_ids
from pipeline.core.report import timestamp_us
from pipeline.errors import DecodeError, ServiceUnavailable
from pipeline.monitoring.metrics import ListenerMetrics
from pipeline.postgres.errors import NO_ANSWER

_FIRST_BACKOFF_SECONDS: Final = 0.1
_LONGEST_BACKOFF_SECONDS: Final = 5.0
# A connection that is cut without a word (a firewall, a pulled cable) is noticed by asking it something.
_KEEPALIVE_SECONDS: Final = 15.0
# Without a limit of ours the kernel would repeat what it sends for a quarter of an hour before it says so.
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
    is read again; rows already yielded as they are now are not repeated.
    """

    def __init__(
        self,
        connect: Any,
        read_rows: Any,
        agent_ids: Iterable[uuid.UUID] | None = None,
        *,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """Make a listener.

        `connect()` returns a new asyncpg connection, `read_rows(connection, agent_ids)` is the store's; `registry`
        takes its metrics.
        """
        self._metrics = ListenerMetrics(registry or CollectorRegistry())
        self.freshness = self._metrics.freshness
        self._connect = connect
        self._read_rows = read_rows
        self._watched = None if agent_ids is None else frozenset(agent_ids)
        self._seen: dict[tuple[uuid.UUID, str], tuple[str, str, datetime]] = {}
        self._notified: dict[uuid.UUID, float] = {}
        self._wake = asyncio.Event()
        self._is_cut = False
        self.is_following = False
        """Whether everything watched was read since the last cut, and changes are heard."""

    async def changes(self) -> AsyncIterator[Change]:
        """Iterate changes until cancelled, reconnecting as often as it takes."""
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

    async def _reconnect(self) -> Any:
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ServiceUnavailable),
            wait=tenacity.wait_random_exponential(_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS),
        ):
            with attempt:
                return await self._subscribe()
        raise AssertionError("unreachable: retried for ever")

    async def _subscribe(self) -> Any:
        connection = await self._connect()
        self._is_cut = False
        self._notified.clear()
        connection.add_termination_listener(self._on_cut)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await connection.add_listener(NOTIFY_CHANNEL, self._on_notify)
        except (asyncpg.PostgresError, *NO_ANSWER) as error:
            connection.terminate()
            raise ServiceUnavailable(f"LISTEN failed: {error}") from error
        return connection

    async def _follow(self, connection: Any) -> AsyncIterator[Change]:
        for change in await self._read(connection, self._watched, {}):
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
            notified, self._notified = self._notified, {}
            if notified:
                for change in await self._read(connection, list(notified), notified):
                    yield change

    async def _read(
        self, connection: Any, agent_ids: Iterable[uuid.UUID] | None, notified: dict[uuid.UUID, float]
    ) -> list[Change]:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                rows = await self._read_rows(connection, None if agent_ids is None else list(agent_ids))
        except TimeoutError:
            raise ServiceUnavailable(f"Postgres did not answer for {_ANSWER_SECONDS:.0f} s") from None
        changes = []
        for row in rows:
            agent_id, key, value, error, collected_at = row
            content = (value, error, collected_at)
            if self._seen.get((agent_id, key)) != content:
                self._seen[agent_id, key] = content
                changes.append(Change(agent_id, key, *content, notified.get(agent_id)))
        self._observe(changes)
        return changes

    def _observe(self, changes: list[Change]) -> None:
        if changes and (notified_at := changes[-1].notified_at) is not None:
            collected_at = timestamp_us(changes[-1].collected_at) / 1e6
            self._metrics.freshness.observe("notified", collected_at=collected_at, at=notified_at)

    def _on_notify(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        now = time.time()
        self._metrics.payloads.inc()
        try:
            agent_ids = decode_agent_ids(payload)
        except DecodeError as error:
            self._metrics.ignored_payloads.inc()
            _log.warning("notify_ignored", error=str(error))
            return
        for agent_id in agent_ids:
            if self._watched is None or agent_id in self._watched:
                self._notified[agent_id] = now
        self._wake.set()

    def _on_cut(self, _connection: Any) -> None:
        self._is_cut = True
        self._wake.set()
