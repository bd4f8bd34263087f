"""Event streams of the table's rows (a snapshot, then changes, resumable) and the JSON that they carry."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import msgspec

from pipeline.monitoring.metrics import Freshness, ServeMetrics
from pipeline.serve.live import LiveRow, LiveTable, Watcher

# Source: coder's workspace page, which sends changes at most once a second and everything again after five.
_EVENT_SECONDS: Final = 1.0
_RESEND_SECONDS: Final = 5.0
# Rows per event at most: usually 200 kB, about 4 MB with values at their limit.
_EVENT_ROWS: Final = 1000


@dataclass(slots=True)
class MetadataRow:
    """A pair's row as it is now."""

    key: str
    value: str
    error: str
    collected_at: datetime
    age_seconds: float
    stale_after_seconds: float
    """The age from which the pair counts as stale: three of its usual intervals."""


@dataclass(slots=True)
class AgentMetadata:
    """All rows of one agent, or those of them that changed."""

    agent_id: UUID
    name: str | None
    """What the agent calls itself, if that is no UUID."""
    metadata: list[MetadataRow]


@dataclass(slots=True)
class WatchedAgent(AgentMetadata):
    """One agent in an event."""

    left_out_pairs: int
    """How many pairs, of any agents, events leave out because AGENT_METADATA_SERVE_MAX_PAIRS are held; to 2 %."""


@dataclass(slots=True)
class ManyAgents:
    """Several agents at one time."""

    now: datetime
    agents: list[AgentMetadata]
    left_out_pairs: int = 0
    """As of a WatchedAgent; 0 in an answer that was read from Postgres."""


Body = AgentMetadata | ManyAgents
# Makes the body of an event, of rows and the table that they are from.
Shape = Callable[[Sequence[LiveRow], LiveTable], Body]


def one_agent(agent_id: UUID, rows: Iterable[LiveRow], table: LiveTable) -> WatchedAgent:
    """Show rows of one agent."""
    return WatchedAgent(agent_id, table.name(agent_id), list(_rows_now(rows)), table.left_out_pairs)


def many_agents(rows: Sequence[LiveRow], table: LiveTable) -> ManyAgents:
    """Show rows, grouped by agent."""
    agents: dict[UUID, AgentMetadata] = {}
    for row, metadata in zip(rows, _rows_now(rows), strict=True):
        if row.agent_id not in agents:
            agents[row.agent_id] = AgentMetadata(row.agent_id, table.name(row.agent_id), [])
        agents[row.agent_id].metadata.append(metadata)
    return ManyAgents(datetime.now(UTC), list(agents.values()), table.left_out_pairs)


def _rows_now(rows: Iterable[LiveRow]) -> Iterator[MetadataRow]:
    now = time.time()
    for row in rows:
        age = max(0.0, round(now - row.collected_at.timestamp(), 3))
        yield MetadataRow(row.key, row.value, row.error, row.collected_at, age, row.stale_after_seconds)


class EventStreams:
    """The open event streams of one process.

    An event's id is the process's own random id and the table's version at the event's last row. A client that sends
    it back gets what changed since; versions count within one process, so another process answers with a snapshot.
    """

    def __init__(self, table: LiveTable, metrics: ServeMetrics, freshness: Freshness) -> None:
        self._table = table
        self._metrics = metrics
        self._freshness = freshness
        self._run_id = secrets.token_hex(4)
        self._is_closing = False

    def close(self) -> None:
        """End all streams; their clients reconnect to the next process."""
        self._is_closing = True
        self._table.wake_all()

    def open(self, agent_ids: Collection[UUID] | None, last_event_id: str | None, shape: Shape) -> AsyncIterator[bytes]:
        """Open a stream of some agents, or of all (None); `shape` makes an event's body of its rows.

        Guarantee: it is never silent for longer than 5 s. Some agents' snapshot is repeated then, to keep ages current;
        all agents' rows are too many for that, so an event without rows says what time it is.
        """
        return self._events(agent_ids, self._known_version(last_event_id), shape)

    def _known_version(self, event_id: str | None) -> int:
        """Return the version of an event id; 0, for a snapshot, if the id is not of this process."""
        run_id, _, number = (event_id or "").partition("-")
        is_ours = run_id == self._run_id and number.isdecimal() and len(number) < 19
        return min(int(number), self._table.version) if is_ours else 0

    async def _events(self, agent_ids: Collection[UUID] | None, since: int, shape: Shape) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        is_repeating = agent_ids is not None
        name = b"changes" if since else b"snapshot"
        resend_at = loop.time() + _RESEND_SECONDS
        send_seconds = 0.0
        watcher = self._table.watch(agent_ids, since)
        self._metrics.watchers.inc()
        try:
            while not self._is_closing:
                for event_id, rows in self._parts(watcher):
                    if name == b"changes" and rows and rows[0].notified_at:
                        self._freshness.observe("sent", collected_at=rows[0].collected_at.timestamp(), at=time.time())
                    sending_at = loop.time()
                    try:
                        yield _event(name, event_id, shape(rows, self._table))
                    finally:
                        send_seconds = loop.time() - sending_at
                    name = b"changes"
                sent_at = loop.time()
                if not is_repeating or sent_at >= resend_at:
                    resend_at = sent_at + _RESEND_SECONDS
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(resend_at):
                        await watcher.changed.wait()
                await asyncio.sleep(max(0.0, sent_at + _EVENT_SECONDS - loop.time()))
                if is_repeating and loop.time() >= resend_at:
                    watcher.rewind()
                    name = b"snapshot"
        finally:
            if send_seconds > _EVENT_SECONDS:  # the client stopped reading: its last event did not get through
                self._metrics.dropped_watchers.inc()
            self._metrics.watchers.dec()
            self._table.unwatch(watcher)

    def _parts(self, watcher: Watcher) -> Iterator[tuple[str, list[LiveRow]]]:
        """Cut what a watcher has not seen into events of at most 1,000 rows; one event without rows if nothing is new.

        A client whose connection breaks between two parts resumes after the first, as the id counts its last row.
        """
        rows = watcher.take()
        for start in range(0, max(1, len(rows)), _EVENT_ROWS):
            part = rows[start : start + _EVENT_ROWS]
            is_last = start + _EVENT_ROWS >= len(rows)
            yield f"{self._run_id}-{watcher.seen if is_last else part[-1][0]}", [row for _, row in part]


def _event(name: bytes, event_id: str, body: Body) -> bytes:
    # JSON has no line breaks of its own, so one data line is enough.
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (event_id.encode(), name, msgspec.json.encode(body))
