"""Send the changes of coder's table as reports to the events topic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import groupby, islice
from operator import attrgetter
from typing import Final, NamedTuple
from uuid import UUID

import structlog
import tenacity

from pipeline.bridge.coder_table import EVERYTHING, CoderRow, CoderTable
from pipeline.core.report import MAX_REPORT_KEYS_BYTES, Entry, Report, encode_report
from pipeline.core.values import limit_value, utf8_length
from pipeline.errors import ServiceUnavailable
from pipeline.kafka.publisher import Publisher
from pipeline.monitoring.health import Outage
from pipeline.monitoring.metrics import BridgeMetrics

_FIRST_BACKOFF_SECONDS: Final = 0.1
_LONGEST_BACKOFF_SECONDS: Final = 5.0
# Kafka acknowledges within milliseconds.
UNACKNOWLEDGED_SECONDS: Final = 10.0
# Agents whose rows are read, and sent, at a time: a few MB with usual values.
_AGENTS_PER_READ: Final = 500
# As many of the longest keys, values and errors, each byte escaped by six, stay under Kafka's 1 MB for a record.
_ENTRIES_PER_REPORT: Final = 32
# A look through the table may take at most this part of the time, however large it is: coder needs its database.
_SHARE_OF_TIME: Final = 0.2

_log = structlog.get_logger(__name__)


class Copied(NamedTuple):
    """What a look through the table has sent."""

    rows: int
    reports: int


class Bridge:
    """Reads what changed in coder's table, and sends it; a connection that is lost begins with everything again.

    Guarantee: a state of a row that lasts from its commit until the next look is sent, whatever its collected_at, and
    whatever the clocks of the servers that write. One that another replaced before is not, as the latest wins. A row
    counts as sent when Kafka has acknowledged it (acks=all); until then the bridge waits, and reads no further.
    """

    def __init__(
        self,
        database_url: str,
        *,
        publisher: Publisher,
        topic: str,
        poll_seconds: float,
        metrics: BridgeMetrics,
    ) -> None:
        """Make a bridge; it connects when it runs. `publisher` must choose partitions as agents' own producers do."""
        self._database_url = database_url
        self._publisher = publisher
        self._topic = topic
        self._poll_seconds = poll_seconds
        self._metrics = metrics
        self._postgres = Outage("Postgres")
        self._kafka = Outage("Kafka")
        self._has_copied = False
        metrics.outage_seconds.labels("postgres").set_function(self._postgres.seconds)
        metrics.outage_seconds.labels("kafka").set_function(self.unacknowledged_seconds)

    async def run(self) -> None:
        """Follow the table until cancelled.

        Raises:
            ConfigError: the database refuses us, or has no such table.
            PipelineError: Kafka refuses the reports for good.
        """
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ServiceUnavailable),
            wait=tenacity.wait_random_exponential(_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS),
            before_sleep=self._on_cut,
        )
        await retrying(self._follow)

    async def copy(self) -> Copied:
        """Send the whole table once.

        Raises:
            ServiceUnavailable: the database can't be reached, or failed meanwhile.
            ConfigError, PipelineError: as run().
        """
        async with CoderTable.opened(self._database_url) as table:
            return await _Copy(table, self._send).look()

    def unacknowledged_seconds(self) -> float:
        """Return for how long Kafka has not acknowledged what was sent last; 0 if it has."""
        return self._kafka.seconds()

    def why_not_ready(self) -> str | None:
        """Say why the events topic does not have everything that the table has had."""
        if (seconds := self.unacknowledged_seconds()) > UNACKNOWLEDGED_SECONDS:
            return f"Kafka has not acknowledged reports for {seconds:.0f} s"
        if (why := self._postgres.why_unavailable()) is not None:
            return f"coder's {why}"
        return None if self._has_copied else "the table is being sent for the first time"

    async def _follow(self) -> None:
        """Look through the table again and again, and read whom coder notifies of in between, until a cut."""
        async with CoderTable.opened(self._database_url) as table:
            self._postgres.note(answers=True)
            copy = _Copy(table, self._send)
            while True:
                started = time.monotonic()
                copied = await copy.look()
                seconds = time.monotonic() - started
                self._metrics.show_look(started, seconds)
                if copy.looks == 1:
                    self._has_copied = True
                    _log.info("table_sent", rows=copied.rows, reports=copied.reports, seconds=round(seconds, 3))
                next_look = started + max(self._poll_seconds, seconds / _SHARE_OF_TIME)
                while (left := next_look - time.monotonic()) > 0:
                    await copy.read(await table.notified(left))

    def _on_cut(self, retry_state: tenacity.RetryCallState) -> None:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if self._postgres.why_unavailable() is None:
            self._metrics.cuts.inc()
            _log.warning("bridge_cut", error=str(error), advice="reconnecting, then sending the table again")
        self._postgres.note(answers=False)

    async def _send(self, reports: Sequence[Report], rows: int) -> None:
        """Send reports; return when Kafka has acknowledged them."""
        self._kafka.note(answers=False)
        acknowledged = [
            await self._publisher.send(self._topic, encode_report(report), key=report.agent_id.encode())
            for report in reports
        ]
        await asyncio.gather(*acknowledged)
        self._kafka.note(answers=True)
        self._metrics.rows.inc(rows)
        self._metrics.reports.inc(len(reports))


class _Copy:
    """How far the table has been sent, by one connection to it."""

    def __init__(self, table: CoderTable, send: Callable[[Sequence[Report], int], Awaitable[None]]) -> None:
        self._table = table
        self._send = send
        self._horizon = EVERYTHING
        # By which transactions the rows were written that were sent and are still "since" the horizon. Usually these
        # are the last few; after a transaction that stays open, at most all rows of the table.
        self._sent: dict[tuple[UUID, str], int] = {}
        self.looks = 0

    async def look(self) -> Copied:
        """Look through the table, and send what was written since the last look and is not sent yet."""
        horizon = await self._table.horizon()
        copied = await self._copy(await self._table.changed_agents(self._horizon), horizon)
        self._sent = {pair: number for pair, number in self._sent.items() if number >= horizon}
        self._horizon = horizon
        self.looks += 1
        return copied

    async def read(self, agent_ids: Sequence[UUID]) -> None:
        """Send what of these agents was written since the last look and is not sent yet."""
        await self._copy(agent_ids, self._horizon)

    async def _copy(self, agent_ids: Sequence[UUID], next_horizon: int) -> Copied:
        copied = Copied(0, 0)
        waiting = iter(agent_ids)
        while some := list(islice(waiting, _AGENTS_PER_READ)):
            rows = [
                row
                for row in await self._table.rows(some, self._horizon)
                if self._sent.get((row.agent_id, row.key)) != row.transaction_id
            ]
            reports = list(_reports(rows))
            await self._send(reports, len(rows))
            for row in rows:
                if row.transaction_id >= next_horizon:
                    self._sent[row.agent_id, row.key] = row.transaction_id
            copied = Copied(copied.rows + len(rows), copied.reports + len(reports))
        return copied


def _reports(rows: Sequence[CoderRow]) -> Iterator[Report]:
    """Make reports of rows, which are ordered by agent, within the limits of one."""
    for agent_id, of_agent in groupby(rows, attrgetter("agent_id")):
        entries: list[Entry] = []
        keys_bytes = 0
        for row in of_agent:
            key_bytes = utf8_length(row.key)
            if len(entries) == _ENTRIES_PER_REPORT or keys_bytes + key_bytes > MAX_REPORT_KEYS_BYTES:
                yield Report(str(agent_id), entries)
                entries, keys_bytes = [], 0
            entries.append(Entry(row.key, *limit_value(row.value, row.error), row.collected_at))
            keys_bytes += key_bytes
        yield Report(str(agent_id), entries)
