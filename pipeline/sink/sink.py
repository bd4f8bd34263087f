"""The sink: applies waiting batches to the store, partition by partition, holding them back while it is unavailable."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final, Literal

import structlog
import tenacity
from confluent_kafka import Message

from pipeline.core.batch import Batch, Row, decode_batch, encode_batch, separate_unstorable, unstorable_reason
from pipeline.errors import (
    ConfigError,
    DecodeError,
    FlushFailed,
    NewerVersion,
    ProgressGap,
    RowRejected,
    ServiceUnavailable,
)
from pipeline.kafka.dead_letters import DeadLetterWriter
from pipeline.kafka.records import as_record
from pipeline.monitoring.lag import Position
from pipeline.monitoring.metrics import SinkMetrics
from pipeline.postgres.progress import Received, called
from pipeline.postgres.store import Applied
from pipeline.sink.batches_topic import BatchesTopic
from pipeline.sink.consumer import BatchConsumer, buffered_bytes

# Waiting batches are merged into transactions of up to this many entries: enough for dedup after an outage, and short
# enough, at about 100,000 rows a second, to keep locks brief.
MAX_ENTRIES_PER_TRANSACTION: Final = 10_000
# Backoff while Postgres is unavailable: random between 0 and a ceiling that doubles from the first to the second.
_FIRST_BACKOFF_SECONDS: Final = 0.2
_LONGEST_BACKOFF_SECONDS: Final = 15.0
_DRAIN_POLL_SECONDS: Final = 0.02

_log = structlog.get_logger(__name__)


class Sink:
    """One writer task per partition, so that partitions don't wait for each other."""

    def __init__(
        self,
        *,
        consumer: BatchConsumer,
        topic: BatchesTopic,
        dead_letters: DeadLetterWriter,
        metrics: SinkMetrics,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._consumer = consumer
        self._topic = topic
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._on_failure = on_failure
        self._waiting: dict[int, deque[Message]] = {}
        self._arrived: dict[int, asyncio.Event] = {}
        self._writers: dict[int, asyncio.Task[None]] = {}
        self._applied: dict[int, int] = {}
        self._held_since: float | None = None
        self._newer: dict[int, NewerVersion] = {}

    def start(self) -> asyncio.Task[None]:
        """Start consuming; see BatchConsumer.start for the task."""
        return self._consumer.start(self.take, self.lose)

    @property
    def is_holding(self) -> bool:
        """Tell whether batches are held back now, because Postgres can't take them."""
        return self._held_since is not None

    @property
    def held_seconds(self) -> float:
        """How long batches have been held back; 0 if they are not."""
        return 0.0 if self._held_since is None else time.monotonic() - self._held_since

    @property
    def why_upgrade(self) -> str | None:
        """Say which partitions wait for sinks of a newer version, if any do."""
        if not self._newer:
            return None
        return f"partitions {sorted(self._newer)} wait at {next(iter(self._newer.values()))}"

    def positions(self) -> Mapping[int, Position]:
        """Return how far each partition that the consumer owns now is applied."""
        positions = dict(self._consumer.positions())
        for partition, waiting in self._waiting.items():
            if waiting and partition in positions:
                appended_at = max(0, waiting[0].timestamp()[1]) / 1000
                positions[partition] = Position(waiting[0].offset(), positions[partition].reached, appended_at)
        return positions

    def take(self, partition: int, messages: Sequence[Message]) -> None:
        """Queue records of a partition, in offset order; one that waits for an upgrade keeps none of them."""
        if partition in self._newer:
            self._consumer.release(buffered_bytes(messages))
            return
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
                self._consumer.release(buffered_bytes(self._waiting.pop(partition)))
                del self._arrived[partition]
                self._newer.pop(partition, None)
        self._metrics.held_partitions.set(len(self._newer))

    async def drain(self, timeout_seconds: float) -> bool:
        """Wait until everything that Kafka holds at this moment is applied; false if that takes too long.

        What is left stays in Kafka, as what waits for an upgrade does. While Postgres can't take batches, or once
        a writer has failed, it returns at once.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            ends = await self._consumer.ends()
        except ServiceUnavailable as error:
            return _leave_unapplied(str(error))
        while any(self._applied.get(n, 0) < end for n, end in ends.items() if n not in self._newer):
            if any(writer.done() for n, writer in self._writers.items() if n not in self._newer):
                return False
            if self.is_holding:
                return _leave_unapplied("Postgres can't take them")
            if time.monotonic() > deadline:
                return _leave_unapplied(f"not everything was applied within {timeout_seconds:g} s")
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        return True if self.why_upgrade is None else _leave_unapplied(self.why_upgrade)

    async def _write(self, partition: int) -> None:
        waiting, arrived = self._waiting[partition], self._arrived[partition]
        while True:
            await arrived.wait()
            messages, received = await self._next(partition)
            if not messages:
                return  # until it is lost, and some sink reads it again from there
            started = time.perf_counter()
            try:
                applied = await self._apply_when_possible(partition, received)
            except ProgressGap as gap:
                _log.warning("records_skipped_going_back", partition=partition, expected=gap.expected)
                self._consumer.release(buffered_bytes(waiting))
                waiting.clear()
                await self._consumer.seek(partition, gap.expected)
                self._drop_beyond(waiting, gap.expected)
                if not waiting:
                    arrived.clear()
                continue
            self._observe(applied, time.perf_counter() - started)
            for _ in messages:
                waiting.popleft()
            if not waiting:
                arrived.clear()
            self._consumer.release(buffered_bytes(messages))
            self._applied[partition] = messages[-1].offset() + 1
            self._consumer.commit(partition, messages[-1].offset() + 1)

    def _drop_beyond(self, waiting: deque[Message], expected: int) -> None:
        """Drop what arrived before the consumer went back: it comes again, after what is missing."""
        while waiting and waiting[0].offset() > expected:
            self._consumer.release(buffered_bytes([waiting.popleft()]))

    async def _apply_when_possible(self, partition: int, received: Sequence[Received]) -> Applied:
        """Apply, waiting out any outage.

        Raises:
            ProgressGap: records before these are missing although Kafka still has them.
        """
        retrying = tenacity.AsyncRetrying(
            # ConfigError: a password or a right was revoked while this ran; an operator may restore it, and exiting
            # would not help.
            retry=tenacity.retry_if_exception_type((ServiceUnavailable, ConfigError)),
            wait=tenacity.wait_random_exponential(_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS),
            before_sleep=self._hold,
            reraise=True,
        )
        reject = partial(self._reject, partition, received)
        earliest = 0
        while True:
            try:
                applied: Applied = await retrying(self._topic.apply, partition, received, reject, earliest=earliest)
            except ProgressGap as gap:
                earliest = await retrying(self._consumer.earliest, partition)
                if earliest <= gap.expected:
                    raise
            else:
                self._resume()
                return applied

    async def _next(self, partition: int) -> tuple[list[Message], list[Received]]:
        """Decode as many waiting records as go into one transaction, none if the partition has to wait for an upgrade.

        They stay in `waiting` until the transaction is done.
        """
        messages: list[Message] = []
        received, entries, acknowledgements = [], 0, []
        for message in tuple(self._waiting[partition]):
            try:
                batch, unstorable = separate_unstorable(decode_batch(message.value()))
                acknowledgements += [await self._reject_unstorable(partition, message, row) for row in unstorable]
            except NewerVersion as newer:
                if not messages:
                    self._await_upgrade(partition, newer)
                break
            except DecodeError as error:
                dead = await self._dead_letters.write_record(partition, as_record(message), str(error))
                acknowledgements.append(dead)
                self._metrics.dead_letters.labels("undecodable").inc()
                batch = None
            messages.append(message)
            received.append(Received(message.offset(), batch))
            entries += len(batch.agent_ids) if batch else 0
            if entries >= MAX_ENTRIES_PER_TRANSACTION:
                break
        await asyncio.gather(*acknowledgements)
        return messages, received

    def _await_upgrade(self, partition: int, newer: NewerVersion) -> None:
        """Apply nothing more of a partition. Its first record is kept, to show the lag; those behind it are dropped."""
        first, *others = self._waiting[partition]
        self._waiting[partition] = deque([first])
        self._consumer.release(buffered_bytes(others))
        self._newer[partition] = newer
        self._metrics.held_partitions.set(len(self._newer))
        _log.warning("partition_held_back", partition=partition, offset=first.offset(), error=str(newer))

    async def _reject(self, partition: int, given: Sequence[Received], row: Row, error: RowRejected) -> Awaitable[None]:
        _log.warning("row_rejected", agent_id=row.agent_id, key=row.key, error=str(error), sqlstate=error.sqlstate)
        return await self._dead_letters.write_row(partition, row._replace(agent_id=called(row.agent_id, given)), error)

    async def _reject_unstorable(self, partition: int, message: Message, batch: Batch) -> Awaitable[None]:
        """Dead-letter a row as a batch of its own: a report can't carry its time, and it must not get another."""
        (agent_id,), (key,), reason = batch.agent_ids, batch.keys, unstorable_reason(*batch.collected_at_us)
        _log.warning("row_rejected", agent_id=agent_id, key=key, error=reason)
        self._metrics.dead_letters.labels("row_rejected").inc()
        agent = called(agent_id, [Received(message.offset(), batch)])
        record = as_record(message)._replace(key=agent.encode(), value=encode_batch(batch))
        return await self._dead_letters.write_record(partition, record, reason)

    def _hold(self, state: tenacity.RetryCallState) -> None:
        self._metrics.failed_flushes.inc()
        error = state.outcome.exception() if state.outcome else None
        self._metrics.publish_errors.inc(error.payloads if isinstance(error, FlushFailed) else 0)
        if not self.is_holding:
            self._held_since = time.monotonic()
            _log.warning("holding_batches_back", error=str(error), advice="they wait in Kafka; nothing is lost")

    def _resume(self) -> None:
        if self.is_holding:
            self._held_since = None
            _log.info("writing_again")

    def _observe(self, applied: Applied, seconds: float) -> None:
        metrics, written, now = self._metrics, applied.written, time.time()
        for batch in applied.batches:
            metrics.batches.labels(batch.reason_label).inc()
            metrics.batch_size.observe(len(batch.agent_ids))
            metrics.flush_seconds.labels(batch.reason_label).observe(seconds)
            metrics.flushed.inc(len(batch.agent_ids))
            for keys in Counter(batch.agent_ids).values():
                metrics.batch_utilization.observe(keys)
            if batch.agent_ids:
                metrics.freshness.observe("committed", collected_at=batch.sampled_time, at=now)
        metrics.skipped_batches.inc(applied.skipped)
        metrics.rows_written.inc(written.rows)
        metrics.rows_inserted.inc(written.inserted)
        metrics.notify_payloads.inc(applied.payloads)
        metrics.rows_unchanged.inc(applied.pairs - written.rows - written.rejected - written.stale)
        metrics.stale_entries.inc(written.stale)
        metrics.dead_letters.labels("row_rejected").inc(written.rejected)
        if applied.lost:
            metrics.lost_batches.inc(applied.lost)
            _log.warning("batches_lost_to_retention", count=applied.lost)

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)


def _leave_unapplied(why: str) -> Literal[False]:
    _log.warning("batches_left_unapplied", why=why, advice="they wait in Kafka for the next start")
    return False
