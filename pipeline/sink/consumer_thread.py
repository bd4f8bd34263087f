"""librdkafka's consumer of the batches topic in its own thread: polling, pausing, checking that offsets only rise."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import structlog
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from pipeline.errors import ConfigError, ServiceUnavailable, TopicMismatch

# Fetched but not yet applied batches, per process; as much again may wait inside librdkafka.
MAX_BUFFERED_BYTES: Final = 64 * 1024 * 1024
_POLL_SECONDS: Final = 0.1
_RECORDS_PER_POLL: Final = 200
_REFUSALS: Final = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)

_log = structlog.get_logger(__name__)

T = TypeVar("T")
Locate = Callable[[Sequence[int]], Awaitable[Mapping[int, int]]]


class Assigned(NamedTuple):
    """These are now all partitions that the consumer owns, with the offsets at which it starts reading them."""

    offsets: Mapping[int, int]


class Fetched(NamedTuple):
    """Records of one partition, in offset order."""

    partition: int
    messages: list[Message]


class Ended(NamedTuple):
    """The partition holds nothing more for now: `offset` is its end, behind any transaction markers."""

    partition: int
    offset: int


class Revoked(NamedTuple):
    """The consumer owns no partitions any more; these were its own."""

    partitions: Sequence[int]


Event = Assigned | Fetched | Ended | Revoked


class ConsumerThread:
    """Owns librdkafka's consumer; nobody else touches it, and what it learns arrives on the event loop as events.

    `locate(partitions)` runs on the event loop and returns where to start; until it does, the consumer stays in the
    group and rebalances continue. `on_event` is called on the event loop, in the order of the events.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        topic: str,
        locate: Locate,
        on_event: Callable[[Event], None],
        max_buffered_bytes: int = MAX_BUFFERED_BYTES,
    ) -> None:
        self._topic = topic
        self._group = config["group.id"]
        self._locate = locate
        self._on_event = on_event
        self._max_buffered_bytes = max_buffered_bytes
        self._loop = asyncio.get_running_loop()
        self._consumer = Consumer(dict(config))
        self._is_closing = threading.Event()
        self._has_ended = threading.Event()
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._locating: concurrent.futures.Future[Mapping[int, int]] | None = None
        self._expected: dict[int, int] = {}  # the lowest offset that may come next, by partition
        # Written on the event loop, read here; a commit that is lost in between is followed by others.
        self.buffered_bytes = 0
        self._committable: dict[int, int] = {}
        # Written here, read from any thread.
        self.is_paused = False
        self.is_assigned = False
        self.polled_at = time.monotonic()
        self.out_of_group_since: float | None = time.monotonic()  # None: a member

    async def call(self, function: Callable[[Consumer], T]) -> T:
        """Run a function in the consumer's thread; in any other it would wait behind poll().

        Raises:
            ServiceUnavailable: the consumer has ended.
            KafkaException: of the function.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.put((future, lambda: function(self._consumer)))
        if self._has_ended.is_set():
            self._refuse_calls()
        return await asyncio.wrap_future(future)

    async def seek(self, partition: int, offset: int) -> None:
        """Read on at an offset; raises as `call` does."""

        def seek(consumer: Consumer) -> None:
            consumer.seek(TopicPartition(self._topic, partition, offset))
            self._expected[partition] = offset

        await self.call(seek)

    def commit(self, partition: int, offset: int) -> None:
        """Have the next turn commit an offset; failures don't matter."""
        self._committable[partition] = offset

    def close(self) -> None:
        """Have `run` leave the group and return."""
        self._is_closing.set()

    def run(self) -> None:
        """Consume until closed; blocks.

        Raises:
            ConfigError: Kafka refuses us a right.
            TopicMismatch: the topic was deleted and recreated; nothing of the new one was delivered.
            ServiceUnavailable: librdkafka can't continue.
        """
        consumer = self._consumer
        consumer.subscribe([self._topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked)
        try:
            while not self._is_closing.is_set():
                self.polled_at = time.monotonic()
                self._start_reading()
                self._regulate()
                self._do_calls()
                first = consumer.poll(_POLL_SECONDS)  # consume() alone would wait for its number or its timeout
                if first is not None:
                    self._deliver([first, *consumer.consume(_RECORDS_PER_POLL, 0)])
            self._do_calls()
        finally:
            self._has_ended.set()
            self._refuse_calls()
            consumer.close()

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.out_of_group_since = None
        # Nothing is fetched before Postgres has said where to start: Kafka's own offsets are for lag tools.
        consumer.assign([])
        numbers = [partition.partition for partition in partitions]
        self._locating = asyncio.run_coroutine_threadsafe(self._located(numbers), self._loop)

    async def _located(self, numbers: Sequence[int]) -> Mapping[int, int]:
        offsets = await self._locate(numbers)
        return {number: offsets.get(number, OFFSET_BEGINNING) for number in numbers}

    def _start_reading(self) -> None:
        if self._locating is None or not self._locating.done():
            return
        offsets, self._locating = self._locating.result(), None
        partitions = [TopicPartition(self._topic, number, offset) for number, offset in offsets.items()]
        self._consumer.assign(partitions)
        self._consumer.resume(partitions)  # librdkafka keeps a partition paused from one assignment to the next
        self.is_paused = False
        self._expected = {number: max(0, offset) for number, offset in offsets.items()}
        self._emit(Assigned(offsets))
        self.is_assigned = True
        _log.info("partitions_assigned", topic=self._topic, partitions=sorted(offsets))

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._locating is not None:
            self._locating.cancel()
            self._locating = None
        self.is_assigned = False
        self.out_of_group_since = time.monotonic()
        self._emit(Revoked([partition.partition for partition in partitions]))
        consumer.unassign()

    def _deliver(self, messages: list[Message]) -> None:
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
                raise ServiceUnavailable(f"the consumer of {self._topic} can't continue: {error.str()}")
            else:
                _log.warning("consume_failed", topic=self._topic, error=error.str())
        for partition, records in by_partition.items():
            if records[0].offset() < self._expected.get(partition, 0):
                # Its batches would be mistaken for those with the same offsets that were applied long ago.
                raise TopicMismatch(f"{self._topic} was recreated while this sink read it: start it again")
            self._expected[partition] = records[-1].offset() + 1
            self._emit(Fetched(partition, records))
        for partition, end in ends.items():
            self._emit(Ended(partition, end))

    def _emit(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._on_event, event)

    def _regulate(self) -> None:
        """Pause fetching while too much waits for Postgres; polling continues, so the group keeps us."""
        limit = self._max_buffered_bytes // 2 if self.is_paused else self._max_buffered_bytes
        is_full = self.buffered_bytes > limit
        if is_full != self.is_paused:
            (self._consumer.pause if is_full else self._consumer.resume)(self._consumer.assignment())
            self.is_paused = is_full

    def _do_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                future, function = self._calls.get_nowait()
                if not future.set_running_or_notify_cancel():
                    continue  # the caller was cancelled meanwhile: a partition was lost
                try:
                    future.set_result(function())
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
                future, _ = self._calls.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.set_exception(ServiceUnavailable(f"the consumer of {self._topic} has ended"))
