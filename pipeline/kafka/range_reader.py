"""Read bounded ranges of a topic's records, without any effect on consumer groups."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Self

import msgspec
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from pipeline.errors import ANSWER_SECONDS, ConfigError, ServiceUnavailable

_RECORDS_PER_READ: Final = 5000
_READ_SECONDS: Final = 0.2
# librdkafka retries forever; give up after a minute of silence.
_SILENCE_SECONDS: Final = 60.0
_BUFFER_KILOBYTES: Final = 64 * 1024
_REFUSALS: Final = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED)

_log = structlog.get_logger(__name__)


class OffsetRange(msgspec.Struct, frozen=True, omit_defaults=True):
    """Offsets `start` up to, not including, `end` of a partition.

    `is_cut`: retention has deleted records before `start` that may have belonged to the range.
    """

    partition: int
    start: int
    end: int
    is_cut: bool = False

    @property
    def length(self) -> int:
        """How many offsets it spans; after compaction, or with transactions, there may be fewer records."""
        return self.end - self.start


class RangeReader:
    """Reads one range after another; joins no group and commits nothing.

    All methods block, and run one at a time. They raise ServiceUnavailable if Kafka does not answer, and ConfigError
    if this user may not read the topic.
    """

    def __init__(self, client_config: Mapping[str, Any], topic: str) -> None:
        self.topic = topic
        self._range = OffsetRange(-1, 0, 0)
        self._next = 0
        self._last_answer_at = 0.0
        self._lock = threading.Lock()  # a cancelled caller may close the reader during its read
        self._consumer = Consumer(
            {
                **client_config,
                "group.id": "agent-metadata-replay",  # librdkafka requires one; it is never joined
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",  # retention may overtake a slow reader
                # At a partition's end a fetch waits this long for more, and the next partition waits behind it.
                "fetch.wait.max.ms": 10,
                # By default librdkafka pauses for a second whenever 100,000 messages wait.
                "queued.min.messages": 1_000_000,
                "queued.max.messages.kbytes": _BUFFER_KILOBYTES,
            }
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            self._consumer.close()

    def between(self, partitions: Sequence[int], start_ms: int | None, end_ms: int | None) -> list[OffsetRange]:
        """Find the records appended in [start, end), in milliseconds since the Unix epoch.

        None: from the topic's beginning, or to its present end. Partitions without such records are left out.
        """
        marks = {number: self.watermarks(number) for number in partitions}
        starts = {number: low for number, (low, _) in marks.items()}
        if start_ms is not None:
            starts = {number: max(at, starts[number]) for number, at in self._at_time(marks, start_ms).items()}
        ends = {number: high for number, (_, high) in marks.items()}
        if end_ms is not None:
            ends = {number: min(at, ends[number]) for number, at in self._at_time(marks, end_ms).items()}
        return [
            OffsetRange(number, starts[number], ends[number], starts[number] == low > 0)
            for number, (low, _) in marks.items()
            if starts[number] < ends[number]
        ]

    def watermarks(self, partition: int) -> tuple[int, int]:
        """Return the earliest offset that Kafka still has, and the offset of the next record to be appended."""
        marks = self._ask(
            lambda: self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), ANSWER_SECONDS)
        )
        if marks is None:
            raise ServiceUnavailable(f"Kafka did not return the offsets of {self.topic} within {ANSWER_SECONDS:g} s")
        return int(marks[0]), int(marks[1])

    def open(self, offsets: OffsetRange) -> None:
        """Start on a range; the rest of the previous one is dropped."""
        self._range, self._next = offsets, offsets.start
        self._last_answer_at = time.monotonic()
        self._consumer.assign([TopicPartition(self.topic, offsets.partition, offsets.start)])

    @property
    def is_done(self) -> bool:
        """Tell whether the open range is read to its end."""
        return self._next >= self._range.end

    def read(self, limit: int = _RECORDS_PER_READ) -> list[Message]:
        """Return the next records of the open range, in offset order; none if none arrived within 0.2 s."""
        if self.is_done:
            return []
        with self._lock:
            messages = self._consumer.consume(min(limit, self._range.end - self._next), _READ_SECONDS)
        records, has_progress = [], False
        for message in messages:
            error = message.error()
            has_progress = has_progress or error is None or error.code() == KafkaError._PARTITION_EOF
            if error is None:
                self._next = message.offset() + 1
                if message.offset() < self._range.end:
                    records.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                self._next = max(self._next, message.offset())
            elif error.code() == KafkaError._BAD_COMPRESSION:
                self._skip(message)
                break
            elif error.code() in _REFUSALS:
                raise ConfigError(f"Kafka refused to let us read {self.topic}: {error.str()}")
            elif error.fatal() or error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise ServiceUnavailable(f"reading {self.topic} failed: {error.str()}; does the topic still exist?")
        if has_progress:
            self._last_answer_at = time.monotonic()
        elif time.monotonic() - self._last_answer_at > _SILENCE_SECONDS:
            raise ServiceUnavailable(f"Kafka sent no record of {self.topic} for {_SILENCE_SECONDS:g} s; is it up?")
        return records

    def _skip(self, message: Message) -> None:
        """Go past a record that can't be unpacked, at which librdkafka would stay; the worker has dead-lettered it."""
        self._next = max(self._next, message.offset() + 1)
        _log.warning("record_skipped", topic=self.topic, offset=message.offset(), why=message.error().str())
        if not self.is_done:
            self._ask(lambda: self._consumer.seek(TopicPartition(self.topic, self._range.partition, self._next)))

    def records(self, offsets: OffsetRange, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Message]:
        """Open a range and iterate all of its records; `on_read` gets the number of records after each read."""
        self.open(offsets)
        while not self.is_done:
            messages = self.read()
            yield from messages
            on_read(len(messages))

    def _at_time(self, marks: Mapping[int, tuple[int, int]], moment_ms: int) -> dict[int, int]:
        """Return, by partition, the offset of the first record appended at this time or later."""
        times = [TopicPartition(self.topic, number, moment_ms) for number in marks]
        offsets = self._ask(lambda: self._consumer.offsets_for_times(times, ANSWER_SECONDS))
        for item in offsets:
            if item.error is not None:
                raise ServiceUnavailable(f"Kafka did not return the offsets for a time: {item.error.str()}")
        return {item.partition: item.offset if item.offset >= 0 else marks[item.partition][1] for item in offsets}

    def _ask(self, question: Any) -> Any:
        try:
            with self._lock:
                return question()
        except KafkaException as error:
            reason = error.args[0]
            if reason.code() in _REFUSALS:
                raise ConfigError(f"Kafka refused to let us read {self.topic}: {reason.str()}") from error
            raise ServiceUnavailable(f"Kafka did not return the offsets of {self.topic}: {reason.str()}") from error
