"""Consume the batches topic in a thread: records by partition, backpressure, and positions from Postgres."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from pipeline.errors import ConfigError, ServiceUnavailable, TopicMismatch
from pipeline.monitoring.lag import Position

_POLL_SECONDS: Final = 0.1
_RECORDS_PER_POLL: Final = 200
_QUERY_SECONDS: Final = 10.0
# Fetched but not yet applied batches, per process; the same again may wait inside librdkafka.
MAX_BUFFERED_BYTES: Final = 64 * 1024 * 1024

_REFUSALS: Final = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)

_log = structlog.get_logger(__name__)


class BatchConsumer:
    """One member of the sink's consumer group.

    `on_records(partition, messages)` and `on_lost(partitions)` are called on the event loop that made this object;
    `positions(partitions)` says where to begin, and is asked again until it answers. While it doesn't, the consumer
    stays in the group and rebalances go on.
    """

    def __init__(
        self,
        client_config: Mapping[str, Any],
        *,
        topic: str,
        group: str,
        session_timeout_seconds: float,
        positions: Callable[[Sequence[int]], Awaitable[Mapping[int, int]]],
        on_records: Callable[[int, list[Message]], None],
        on_lost: Callable[[Sequence[int]], None],
    ) -> None:
        self._topic = topic
        self._group = group
        self._positions = positions
        self._on_records = on_records
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._is_closing = threading.Event()
        self._has_ended = threading.Event()
        self._buffered_bytes = 0  # written on the event loop only
        self._is_paused = False
        self._begins: dict[int, int] = {}  # where partitions were taken up
        self._reached: dict[int, Position] = {}  # written on the event loop only
        self._expected: dict[int, int] = {}  # nothing below this may come now; touched by the thread only
        self._committable: dict[int, int] = {}
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[..., Any], Any]] = (
            queue.SimpleQueue()
        )
        self._awaited: concurrent.futures.Future[list[TopicPartition]] | None = None
        self._consumer = Consumer(
            {
                **client_config,
                "group.id": group,
                "enable.auto.commit": False,
                "enable.partition.eof": True,  # tells of the end behind transaction markers, which are no records
                "auto.offset.reset": "earliest",
                "partition.assignment.strategy": "roundrobin",
                "session.timeout.ms": round(session_timeout_seconds * 1000),
                "heartbeat.interval.ms": round(session_timeout_seconds * 1000 / 3),
                "fetch.wait.max.ms": 50,
                "queued.max.messages.kbytes": MAX_BUFFERED_BYTES // 1024,
                "error_cb": _log_error,
            }
        )
        self._thread: asyncio.Task[None] | None = None
        self._polled_at = time.monotonic()
        self.is_assigned = False
        self._out_since: float | None = time.monotonic()  # None: a member of the group

    def seconds_out_of_group(self) -> float:
        """Return for how long the group has not counted this consumer in, with partitions or without; from any thread.

        After a broker's restart librdkafka may never find its coordinator again: its own requests time out unsent.
        """
        since = self._out_since
        return 0.0 if since is None else time.monotonic() - since

    def why_stuck(self, stuck_seconds: float) -> str | None:
        """Say for how long the consumer's thread has not polled, if that is too long; from any thread."""
        age = time.monotonic() - self._polled_at
        return f"the consumer has not polled for {age:.0f} s" if age > stuck_seconds else None

    @property
    def is_held(self) -> bool:
        """Tell whether nothing is fetched now, because too much waits to be applied."""
        return self._is_paused

    def positions(self) -> Mapping[int, Position]:
        """Return how far each partition that it owns now was handed over; on the event loop."""
        return self._reached

    def start(self) -> asyncio.Task[None]:
        """Join the group; the task ends with `close`, or with the error that the consumer can't go on from.

        Raises (from the task):
            ConfigError: Kafka refuses us a right.
            TopicMismatch: the topic was deleted and made anew; nothing of the new one was handed on.
            ServiceUnavailable: librdkafka can't go on.
        """
        self._thread = asyncio.create_task(asyncio.to_thread(self._run))
        return self._thread

    async def close(self) -> None:
        """Leave the group."""
        self._is_closing.set()
        if self._thread is not None:
            await asyncio.wait([self._thread])

    def release(self, size_bytes: int) -> None:
        """Say that records of this many bytes are done with."""
        self._buffered_bytes -= size_bytes

    def commit(self, partition: int, offset: int) -> None:
        """Tell Kafka, for lag tools only, that everything before `offset` is applied; failures don't matter."""
        self._committable[partition] = offset

    async def seek(self, partition: int, offset: int) -> None:
        """Go back (or on) to an offset of a partition this consumer owns; without effect if it doesn't."""
        try:
            await self._in_thread(self._seek, partition, offset)
        except (KafkaException, ServiceUnavailable) as error:
            _log.warning("seek_failed", partition=partition, error=str(error))

    def _seek(self, partition: int, offset: int) -> None:
        self._consumer.seek(TopicPartition(self._topic, partition, offset))
        self._expected[partition] = offset

    async def ends(self) -> dict[int, int]:
        """Return the end offsets, now, of owned partitions that hold anything beyond where they were taken up.

        Raises:
            ServiceUnavailable: Kafka did not answer, or the consumer has ended.
        """
        owned = await self._in_thread(self._consumer.assignment)
        marks = {item.partition: await self._watermarks(item.partition) for item in owned}
        return {n: high for n, (low, high) in marks.items() if high > max(low, self._begins.get(n, 0))}

    async def earliest(self, partition: int) -> int:
        """Return the lowest offset that Kafka still has.

        Raises:
            ServiceUnavailable: Kafka did not answer.
        """
        return (await self._watermarks(partition))[0]

    async def _watermarks(self, partition: int) -> tuple[int, int]:
        where = TopicPartition(self._topic, partition)
        try:
            marks = await self._in_thread(self._consumer.get_watermark_offsets, where, _QUERY_SECONDS)
        except KafkaException as error:
            raise ServiceUnavailable(f"Kafka did not say its offsets: {error}") from error
        if marks is None:
            raise ServiceUnavailable(f"Kafka did not say its offsets within {_QUERY_SECONDS} s")
        return int(marks[0]), int(marks[1])

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Have the consumer's own thread do a call: from another it would wait for a consume() that waits for it."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._calls.put((future, call, arguments))
        if self._has_ended.is_set():
            self._refuse_calls()
        return await asyncio.wrap_future(future)

    def _do_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                future, call, arguments = self._calls.get_nowait()
                if not future.set_running_or_notify_cancel():
                    continue  # who asked was cancelled meanwhile: a partition was lost
                try:
                    future.set_result(call(*arguments))
                except (KafkaException, RuntimeError) as error:
                    future.set_exception(error)
        committable, self._committable = self._committable, {}
        if committable:
            offsets = [TopicPartition(self._topic, *item) for item in list(committable.items())]
            try:
                self._consumer.commit(offsets=offsets, asynchronous=True)
            except KafkaException as error:
                _log.debug("commit_failed", error=str(error))

    def _refuse_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                future, *_ = self._calls.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.set_exception(ServiceUnavailable(f"the consumer of {self._topic} has ended"))

    def _run(self) -> None:
        consumer = self._consumer
        consumer.subscribe([self._topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked)
        try:
            while not self._is_closing.is_set():
                self._polled_at = time.monotonic()
                self._take_up()
                self._regulate()
                self._do_calls()
                first = consumer.poll(_POLL_SECONDS)  # consume() alone would wait for its number or its timeout
                if first is not None:
                    self._hand_over([first, *consumer.consume(_RECORDS_PER_POLL, 0)])
            self._do_calls()
        finally:
            self._has_ended.set()
            self._refuse_calls()
            consumer.close()

    def _hand_over(self, messages: list[Message]) -> None:
        by_partition: dict[int, list[Message]] = {}
        ends: dict[int, int] = {}
        for message in messages:
            error = message.error()
            if error is None:
                by_partition.setdefault(message.partition(), []).append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                ends[message.partition()] = message.offset()
            elif error.code() in _REFUSALS:
                raise ConfigError(
                    f"Kafka refuses the sink: {error.str().rstrip('.')}; "
                    f"it needs READ on topic {self._topic} and on group {self._group}"
                )
            elif error.fatal():
                raise ServiceUnavailable(f"the consumer of {self._topic} can't go on: {error.str()}")
            else:
                _log.warning("consume_failed", topic=self._topic, error=error.str())
        for partition, records in by_partition.items():
            if records[0].offset() < self._expected.get(partition, 0):
                # Read on, its batches would be taken for those of the same offsets that were applied long ago.
                raise TopicMismatch(f"{self._topic} was made anew under this sink: start it again")
            self._expected[partition] = records[-1].offset() + 1
            self._loop.call_soon_threadsafe(self._deliver, partition, records)
        for partition, end in ends.items():
            self._loop.call_soon_threadsafe(self._reach, partition, end, 0)

    def _deliver(self, partition: int, messages: list[Message]) -> None:
        self._buffered_bytes += sum(size_bytes(message) for message in messages)
        self._reach(partition, messages[-1].offset() + 1, messages[-1].timestamp()[1])
        self._on_records(partition, messages)

    def _begin(self, offsets: Mapping[int, int]) -> None:
        self._reached = {partition: Position(max(0, at), max(0, at)) for partition, at in offsets.items()}

    def _reach(self, partition: int, offset: int, timestamp_ms: int) -> None:
        if (before := self._reached.get(partition)) is not None:  # else it was lost meanwhile
            self._reached[partition] = Position(offset, offset, max(before.not_before, timestamp_ms / 1000))

    def _regulate(self) -> None:
        """Pause fetching while too much waits for Postgres; polling goes on, so the group keeps us."""
        is_full = self._buffered_bytes > (MAX_BUFFERED_BYTES // 2 if self._is_paused else MAX_BUFFERED_BYTES)
        if is_full != self._is_paused:
            (self._consumer.pause if is_full else self._consumer.resume)(self._consumer.assignment())
            self._is_paused = is_full

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._out_since = None
        # Nothing is fetched before Postgres has said where to begin: Kafka's own offsets are for lag tools.
        consumer.assign([])
        numbers = [partition.partition for partition in partitions]
        self._awaited = asyncio.run_coroutine_threadsafe(self._locate(numbers), self._loop)

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None
        self.is_assigned = False
        self._out_since = time.monotonic()
        numbers = [partition.partition for partition in partitions]
        self._loop.call_soon_threadsafe(self._begin, {})
        self._loop.call_soon_threadsafe(self._on_lost, numbers)
        consumer.unassign()

    async def _locate(self, numbers: Sequence[int]) -> list[TopicPartition]:
        offsets = await self._positions(numbers)
        return [TopicPartition(self._topic, n, offsets.get(n, OFFSET_BEGINNING)) for n in numbers]

    def _take_up(self) -> None:
        if self._awaited is not None and self._awaited.done():
            partitions, self._awaited = self._awaited.result(), None
            self._consumer.assign(partitions)
            self._consumer.resume(partitions)  # librdkafka keeps a partition paused from one assignment to the next
            self._is_paused = False
            self._begins = {p.partition: p.offset for p in partitions}
            self._loop.call_soon_threadsafe(self._begin, self._begins)
            self._expected = {number: max(0, offset) for number, offset in self._begins.items()}
            self.is_assigned = True
            _log.info("partitions_assigned", topic=self._topic, partitions=sorted(p.partition for p in partitions))


def size_bytes(message: Message) -> int:
    """Return how much of the buffer a record takes."""
    return len(message.value() or b"")


def _log_error(error: KafkaError) -> None:
    _log.warning("kafka_unavailable", error=error.str())
