"""One source partition in the worker: chunks in order, the open window, and closed windows until Kafka has them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog
from faust.types import TP

from pipeline.clock import Clock
from pipeline.core.batch import Reason
from pipeline.core.decoding import NOT_PLAIN, RecordDecoder, SchemaId
from pipeline.core.record import Record
from pipeline.core.report import timestamp_us
from pipeline.core.tumbling import TumblingWindows
from pipeline.core.window import ClosedWindow, OpenWindow
from pipeline.errors import ServiceUnavailable, TopicMismatch
from pipeline.kafka.chunks import Chunk
from pipeline.monitoring.lag import Position
from pipeline.monitoring.metrics import WorkerMetrics
from pipeline.worker.transport import ChunkConsumer

# Closed windows that may wait for Kafka's acknowledgement before the partition takes no more records; with the
# open one this bounds a partition's memory to about four times its window capacity. After large rejected records
# none may wait: records of several MB would fill the memory.
MAX_WAITING: Final = 2
_RETRY_SECONDS: Final = 1.0

_log = structlog.get_logger(__name__)


class SourcePartition:
    """Owns one partition of the events topic from assignment to revocation.

    Guarantees: records are folded in offset order and each once, whatever Faust delivers. Closed windows are delivered
    one at a time, in the order in which they closed; `deliver` returns only when a window is safe in Kafka. If it
    raises, `on_failure` gets the error and nothing more is delivered.
    """

    def __init__(
        self,
        tp: TP,
        *,
        consumer: ChunkConsumer,
        backlog_end: int,
        decoder: RecordDecoder,
        windows: TumblingWindows,
        clock: Clock,
        metrics: WorkerMetrics,
        deliver: Callable[[int, ClosedWindow], Awaitable[None]],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Start; everything before `backlog_end` was in the topic already, and is delivered as soon as it is read."""
        self._tp = tp
        self._consumer = consumer
        self._backlog_end: int | None = backlog_end
        self._windows = windows
        self._clock = clock
        self._metrics = metrics
        self._deliver = deliver
        self._on_failure = on_failure
        self._next_offset: int | None = None  # None: nothing read yet
        self._appended_at = 0.0
        self._decoder = decoder
        self._loading_since: float | None = None
        self._closed: deque[ClosedWindow] = deque()  # not acknowledged by Kafka yet
        self._max_waiting = MAX_WAITING
        self._changed = asyncio.Condition()
        self._is_stopping = False
        now = clock.now()
        self.window: OpenWindow = windows.open(now, self._decoder)
        self._closes_at = windows.full_end(now)
        self._flushing = asyncio.create_task(self._flush())
        self._tasks = [asyncio.create_task(self._close_by_clock()), self._flushing]
        for task in self._tasks:
            task.add_done_callback(self._report_failure)

    @property
    def is_held(self) -> bool:
        """Tell whether it takes no records now: closed windows wait for Kafka, or a record for its schema."""
        return self._has_too_many_waiting or self._loading_since is not None

    @property
    def loading_since(self) -> float | None:
        """Since when a record has waited for its schema, in seconds since the Unix epoch; None: none waits."""
        return self._loading_since

    @property
    def _has_too_many_waiting(self) -> bool:
        return len(self._closed) > self._max_waiting

    @property
    def unacknowledged_since(self) -> float | None:
        """When the oldest window closed that Kafka has not acknowledged yet, in seconds since the Unix epoch."""
        closed = tuple(self._closed)  # a scrape reads it from another thread
        return closed[0].end if closed else None

    @property
    def position(self) -> Position:
        """How far the partition is folded."""
        next_offset = self._expected_offset() or 0
        return Position(next_offset, next_offset, self._appended_at)

    async def take(self, chunk: Chunk) -> None:
        """Fold a chunk, unless records before it are missing; waits while too many windows are not safe yet.

        Raises:
            TopicMismatch: the topic was deleted and recreated; a new start reads it from its beginning.
        """
        expected = self._expected_offset()
        if expected is not None and chunk.start != expected:
            successor = await self._reconcile(expected, chunk)
            if successor is None:
                return
            chunk = successor
        last: Record | None = None
        for records in chunk.slices(self._refuse):
            await self._fold(records)
            last = records[-1] if records else last
        read_to = last.offset + 1 if last is not None else chunk.start
        if read_to < chunk.next_offset and not self._is_stopping:
            self.window.pass_over(read_to, chunk.next_offset)
        self._next_offset = chunk.next_offset
        if last is not None:
            self._appended_at = last.timestamp / 1000
            self._observe_produced(last)
        if self._backlog_end is not None and chunk.next_offset >= self._backlog_end:
            has_read_backlog = chunk.start < self._backlog_end
            self._backlog_end = None
            if has_read_backlog:
                await self._close_after_backlog()

    async def finish(self, reason: Reason) -> None:
        """Take no more records, close the open window, and return when everything is delivered, or can't be."""
        await self._stop_taking()
        await self._close(reason)
        delivered = asyncio.create_task(self._until_delivered())
        try:
            await asyncio.wait([delivered, self._flushing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            delivered.cancel()

    async def abandon(self) -> None:
        """Stop at once; what was not delivered was not committed either, and will be read again."""
        await self._stop_taking()
        for task in self._tasks:
            task.cancel()

    def _expected_offset(self) -> int | None:
        """Return where the next chunk has to begin; None while it is not known."""
        return self._next_offset if self._next_offset is not None else self._consumer.committed_offset(self._tp)

    async def _reconcile(self, expected: int, chunk: Chunk) -> Chunk | None:
        """Make a chunk follow the one before it; None if it is to be skipped.

        Raises:
            TopicMismatch: the chunk is of a recreated topic.
        """
        if chunk.start < expected:  # after a seek back, or of another topic of the same name
            if self._consumer.highwater(self._tp) < expected:
                raise TopicMismatch(f"{self._tp.topic} was recreated while this worker read it: start it again")
            return chunk._replace(start=expected) if chunk.next_offset > expected else None
        earliest = (await self._consumer.earliest_offsets(self._tp))[self._tp]
        if earliest <= expected:
            _log.warning("chunk_skipped_going_back", partition=self._tp.partition, expected=expected, got=chunk.start)
            await self._consumer.seek(self._tp, expected)
            return None
        self._metrics.lost_records.inc(earliest - expected)
        _log.warning(
            "records_lost_to_retention",
            partition=self._tp.partition,
            count=earliest - expected,
            advice="lengthen the events topic's retention.ms or add workers",
        )
        return chunk

    async def _fold(self, records: Sequence[Record]) -> None:
        index = 0
        while index < len(records) and not self._is_stopping:
            index = self.window.fold(records, index)
            if self.window.schema_needed is not None:
                await self._load_schema(self.window.schema_needed)
            if self.window.is_full:
                self._closes_at = self._windows.full_end(self._clock.now())
                await self._close("capacity")
        if not records:  # a record batch that couldn't be unpacked, which took a while
            await asyncio.sleep(0)
        self._metrics.records.inc(index)

    async def _load_schema(self, schema_id: SchemaId) -> None:
        """Return when a schema is loaded: while the registry is away its records wait, as in any outage."""
        self._loading_since = since = self._clock.now()
        is_told = False
        try:
            while not self._is_stopping:
                try:
                    await asyncio.to_thread(self._decoder.load, schema_id)
                    break
                except ServiceUnavailable as error:
                    if not is_told:
                        _log.warning("waiting_for_schema", partition=self._tp.partition, error=str(error))
                    is_told = True
                    await self._clock.sleep_until(self._clock.now() + _RETRY_SECONDS)
            if is_told:
                seconds = round(self._clock.now() - since, 1)
                _log.info("schema_wait_over", partition=self._tp.partition, seconds=seconds)
        finally:
            self._loading_since = None

    def _refuse(self, record: Record, reason: str) -> None:
        if not self._is_stopping:
            self.window.reject(record, reason)

    def _observe_produced(self, record: Record) -> None:
        """Sample how old a report was when Kafka received it: one per chunk, as the fold has no time for more."""
        try:
            collected_at = self._decoder.parse(record.value or b"").collected_at
        except NOT_PLAIN:
            return
        if collected_at is not None:
            collected_at_s = timestamp_us(collected_at) / 1e6
            self._metrics.freshness.observe("produced", collected_at=collected_at_s, at=record.timestamp / 1000)

    async def _close_after_backlog(self) -> None:
        """Close the open window before its time: what waited in the topic has waited long enough.

        The next window ends when this one would have.
        """
        if not self._is_stopping:
            await self._close("scheduled")

    async def _close(self, reason: Reason) -> None:
        now = self._clock.now()
        closed = self.window.close(reason, now)
        self.window = self._windows.open(now, self._decoder)
        if closed.last < closed.first:
            return
        self._closed.append(closed)
        self._max_waiting = 0 if closed.is_heavy else MAX_WAITING
        async with self._changed:
            self._changed.notify_all()
            await self._changed.wait_for(lambda: not self._has_too_many_waiting or self._is_stopping)

    async def _close_by_clock(self) -> None:
        while not self._is_stopping:
            closes_at = self._closes_at
            await self._clock.sleep_until(closes_at)
            # Sleep again if a close at capacity has moved the end, or if the sleep was a hair too short.
            if closes_at == self._closes_at and self._clock.now() >= closes_at and not self._is_stopping:
                self._closes_at = self._windows.aligned_end(self._tp.partition, self._clock.now())
                await self._close("scheduled")

    async def _flush(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._closed)
            await self._deliver(self._tp.partition, self._closed[0])
            self._closed.popleft()
            async with self._changed:
                self._changed.notify_all()

    async def _until_delivered(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)

    async def _stop_taking(self) -> None:
        self._is_stopping = True
        async with self._changed:
            self._changed.notify_all()

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)
