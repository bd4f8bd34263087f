"""The sink: applies waiting batches to the store, partition by partition, holding them back while it is away."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import structlog
import tenacity

from pipeline.core.batch import Row, decode_batch
from pipeline.errors import ConfigError, DecodeError, ProgressGap, RowRejected, ServiceUnavailable
from pipeline.monitoring.lag import Position
from pipeline.monitoring.metrics import SinkMetrics

# Waiting batches are merged up to this many entries a transaction: enough for dedup after an outage, and short
# enough, at some 100,000 rows a second, to keep locks brief.
MAX_ENTRIES_PER_TRANSACTION: Final = 10_000
# Backoff while Postgres is away: random between 0 and a ceiling that doubles from the first to the second.
_FIRST_BACKOFF_SECONDS: Final = 0.2
_LONGEST_BACKOFF_SECONDS: Final = 15.0
_DRAIN_POLL_SECONDS: Final = 0.02

_log = structlog.get_logger(__name__)


class Message(Protocol):
    """What the sink reads of a Kafka record."""

    def offset(self) -> int: ...  # noqa: D102
    def value(self) -> bytes | None: ...  # noqa: D102
    def timestamp(self) -> tuple[int, int]: ...  # noqa: D102  # its type, milliseconds since the epoch


class BatchSource(Protocol):
    """What the sink asks of the consumer."""

    def release(self, size_bytes: int) -> None: ...  # noqa: D102
    def commit(self, partition: int, offset: int) -> None: ...  # noqa: D102
    def positions(self) -> Mapping[int, Position]: ...  # noqa: D102
    async def seek(self, partition: int, offset: int) -> None: ...  # noqa: D102
    async def earliest(self, partition: int) -> int: ...  # noqa: D102


# Both send, and return what is done when Kafka has it.
DeadLetterRecord = Callable[[Any, str], Awaitable[Awaitable[None]]]
DeadLetterRow = Callable[[int, Row, RowRejected], Awaitable[Awaitable[None]]]
Apply = Callable[..., Awaitable[Any]]


class Sink:
    """One writer task a partition, so that partitions don't wait for each other.

    `apply(partition, received, reject, earliest=...)` is the store's.
    """

    def __init__(
        self,
        *,
        source: BatchSource,
        apply: Apply,
        dead_letter_record: DeadLetterRecord,
        dead_letter_row: DeadLetterRow,
        metrics: SinkMetrics,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._source = source
        self._apply = apply
        self._dead_letter_record = dead_letter_record
        self._dead_letter_row = dead_letter_row
        self._metrics = metrics
        self._on_failure = on_failure
        self._waiting: dict[int, deque[Any]] = {}
        self._arrived: dict[int, asyncio.Event] = {}
        self._writers: dict[int, asyncio.Task[None]] = {}
        self._applied: dict[int, int] = {}
        self._held_since: float | None = None

    @property
    def is_holding(self) -> bool:
        """Tell whether batches are held back now, because Postgres can't take them."""
        return self._held_since is not None

    @property
    def held_seconds(self) -> float:
        """For how long batches have been held back now; 0 if they are not."""
        return 0.0 if self._held_since is None else time.monotonic() - self._held_since

    def positions(self) -> Mapping[int, Position]:
        """Return how far each partition that the consumer owns now is applied."""
        positions = dict(self._source.positions())
        for partition, waiting in self._waiting.items():
            if waiting and partition in positions:
                first = waiting[0]
                appended_at = max(0, first.timestamp()[1]) / 1000
                positions[partition] = Position(first.offset(), positions[partition].reached, appended_at)
        return positions

    def take(self, partition: int, messages: Sequence[Any]) -> None:
        """Queue records of a partition, in offset order."""
        if partition not in self._writers:
            self._waiting[partition] = deque()
            self._arrived[partition] = asyncio.Event()
            self._writers[partition] = writer = asyncio.create_task(self._write(partition))
            writer.add_done_callback(self._report_failure)
        self._waiting[partition].extend(messages)
        self._arrived[partition].set()

    def lose(self, partitions: Sequence[int]) -> None:
        """Forget partitions that another sink owns now.

        A transaction under way may still commit: its progress tells the new owner, which then skips it.
        """
        for partition in partitions:
            if (writer := self._writers.pop(partition, None)) is not None:
                writer.cancel()
                self._applied.pop(partition, None)
                self._source.release(buffered_bytes(self._waiting.pop(partition)))
                del self._arrived[partition]

    async def drain(self, ends: Mapping[int, int], timeout_seconds: float) -> bool:
        """Wait until everything before `ends` (by partition) is applied; false if that takes too long.

        What is left stays in Kafka. While Postgres is away, or once a writer has failed, there is nothing to wait for.
        """
        deadline = time.monotonic() + timeout_seconds
        while any(self._applied.get(partition, 0) < end for partition, end in ends.items()):
            if any(writer.done() for writer in self._writers.values()):
                return False
            if self.is_holding or time.monotonic() > deadline:
                why = "Postgres is away" if self.is_holding else f"not all was applied within {timeout_seconds:g} s"
                _log.warning("batches_left_unapplied", why=why, advice="they wait in Kafka for the next start")
                return False
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        return True

    async def _write(self, partition: int) -> None:
        waiting, arrived = self._waiting[partition], self._arrived[partition]
        while True:
            await arrived.wait()
            messages, received = await self._next(waiting)
            started = time.perf_counter()
            try:
                applied = await self._apply_when_possible(partition, received)
            except ProgressGap as gap:
                _log.warning("records_skipped_going_back", partition=partition, expected=gap.expected)
                self._source.release(buffered_bytes(waiting))
                waiting.clear()
                await self._source.seek(partition, gap.expected)
                self._drop_beyond(waiting, gap.expected)
                if not waiting:
                    arrived.clear()
                continue
            self._observe(applied, time.perf_counter() - started)
            for _ in messages:
                waiting.popleft()
            if not waiting:
                arrived.clear()
            self._source.release(buffered_bytes(messages))
            self._applied[partition] = messages[-1].offset() + 1
            self._source.commit(partition, messages[-1].offset() + 1)

    def _drop_beyond(self, waiting: deque[Any], expected: int) -> None:
        """Drop what arrived before the consumer had gone back: it comes again, behind what is missing."""
        while waiting and waiting[0].offset() > expected:
            self._source.release(buffered_bytes([waiting.popleft()]))

    async def _apply_when_possible(self, partition: int, received: Sequence[tuple[int, Any]]) -> Any:
        """Apply, waiting out any outage.

        Raises:
            ProgressGap: records before these are missing although Kafka still has them.
        """
        retrying = tenacity.AsyncRetrying(
            # ConfigError: a password or a right that was taken away while this ran is given back, or is not, by
            # somebody who sees that batches are held back; ending would change nothing.
            retry=tenacity.retry_if_exception_type((ServiceUnavailable, ConfigError)),
            wait=tenacity.wait_random_exponential(_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS),
            before_sleep=self._hold,
            reraise=True,
        )
        earliest = 0
        while True:
            try:
                applied: Any = await retrying(
                    self._apply, partition, received, self._rejecting(partition), earliest=earliest
                )
            except ProgressGap as gap:
                earliest = await retrying(self._source.earliest, partition)
                if earliest <= gap.expected:
                    raise
            else:
                self._resume()
                return applied

    async def _next(self, waiting: deque[Any]) -> tuple[list[Any], list[tuple[int, Any]]]:
        """Decode as many waiting records as go into one transaction; they stay in `waiting` until it is done."""
        messages, received, entries, acknowledgements = [], [], 0, []
        for message in tuple(waiting):
            try:
                batch = decode_batch(message.value())
            except DecodeError as error:
                acknowledgements.append(await self._dead_letter_record(message, str(error)))
                self._metrics.dead_letters.labels("undecodable").inc()
                batch = None
            messages.append(message)
            received.append((message.offset(), batch))
            entries += len(batch.agent_ids) if batch else 0
            if entries >= MAX_ENTRIES_PER_TRANSACTION:
                break
        await asyncio.gather(*acknowledgements)
        return messages, received

    def _rejecting(self, partition: int) -> Callable[[Row, RowRejected], Awaitable[Awaitable[None]]]:
        async def reject(row: Row, error: RowRejected) -> Awaitable[None]:
            _log.warning("row_rejected", agent_id=row.agent_id, sqlstate=error.sqlstate)
            return await self._dead_letter_row(partition, row, error)

        return reject

    def _hold(self, state: tenacity.RetryCallState) -> None:
        self._metrics.failed_flushes.inc()
        error = state.outcome.exception() if state.outcome else None
        self._metrics.publish_errors.inc(getattr(error, "unpublished", 0))
        if not self.is_holding:
            self._held_since = time.monotonic()
            _log.warning("holding_batches_back", error=str(error), advice="they wait in Kafka; nothing is lost")

    def _resume(self) -> None:
        if self.is_holding:
            self._held_since = None
            _log.info("writing_again")

    def _observe(self, applied: Any, seconds: float) -> None:
        metrics, now = self._metrics, time.time()
        for batch in applied.batches:
            metrics.batches.labels(batch.reason).inc()
            metrics.batch_size.observe(len(batch.agent_ids))
            metrics.flush_seconds.labels(batch.reason).observe(seconds)
            metrics.flushed.inc(len(batch.agent_ids))
            for keys in Counter(batch.agent_ids).values():
                metrics.batch_utilization.observe(keys)
            if batch.agent_ids:
                metrics.freshness.observe("committed", collected_at=batch.sampled_time, at=now)
        metrics.skipped_batches.inc(applied.skipped)
        metrics.rows_written.inc(applied.rows)
        metrics.notify_payloads.inc(applied.payloads)
        metrics.rows_unchanged.inc(applied.given - applied.rows - applied.rejected - applied.stale)
        metrics.stale_entries.inc(applied.stale)
        metrics.dead_letters.labels("row_rejected").inc(applied.rejected)
        if applied.lost:
            metrics.lost_batches.inc(applied.lost)
            _log.warning("batches_lost_to_retention", count=applied.lost)

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)


def buffered_bytes(messages: Iterable[Any]) -> int:
    """Return how much of the consumer's buffer records take."""
    return sum(len(message.value() or b"") for message in messages)
