"""The batches topic on the event loop: records by partition, positions, and what the sink asks of its consumer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import structlog
from confluent_kafka import KafkaException, Message, TopicPartition

from pipeline.errors import ANSWER_SECONDS, ServiceUnavailable
from pipeline.kafka.errors import log_unavailable
from pipeline.monitoring.lag import Position
from pipeline.sink.consumer_thread import (
    MAX_BUFFERED_BYTES,
    Assigned,
    ConsumerThread,
    Ended,
    Event,
    Fetched,
    Locate,
    Revoked,
)

_log = structlog.get_logger(__name__)


class BatchConsumer:
    """One member of the sink's consumer group.

    `locate(partitions)` returns the offsets at which to start, and takes as long as it must: while it does, the
    consumer stays in the group. Call all methods on the event loop, except those that say "from any thread".
    """

    def __init__(
        self,
        client_config: Mapping[str, Any],
        *,
        topic: str,
        group: str,
        session_timeout_seconds: float,
        locate: Locate,
        max_buffered_bytes: int = MAX_BUFFERED_BYTES,
    ) -> None:
        self._topic = topic
        self._starts: Mapping[int, int] = {}
        self._positions: dict[int, Position] = {}
        self._on_records: Callable[[int, list[Message]], None]
        self._on_lost: Callable[[Sequence[int]], None]
        self._running: asyncio.Task[None] | None = None
        self._thread = ConsumerThread(
            {
                **client_config,
                "group.id": group,
                "enable.auto.commit": False,
                "enable.partition.eof": True,  # reports the end behind transaction markers, which are not records
                "auto.offset.reset": "earliest",
                "partition.assignment.strategy": "roundrobin",
                "session.timeout.ms": round(session_timeout_seconds * 1000),
                "heartbeat.interval.ms": round(session_timeout_seconds * 1000 / 3),
                "fetch.wait.max.ms": 50,
                "queued.max.messages.kbytes": MAX_BUFFERED_BYTES // 1024,
                "error_cb": log_unavailable,
            },
            topic=topic,
            locate=locate,
            on_event=self._on_event,
            max_buffered_bytes=max_buffered_bytes,
        )

    @property
    def is_assigned(self) -> bool:
        """Tell whether it reads partitions, or is in the group without any; from any thread."""
        return self._thread.is_assigned

    @property
    def is_held(self) -> bool:
        """Tell whether nothing is fetched now, because too much waits to be applied; from any thread."""
        return self._thread.is_paused

    def seconds_out_of_group(self) -> float:
        """Return how long this consumer has been out of its group, with partitions or without; from any thread.

        After a broker's restart librdkafka may never find its coordinator again: its own requests time out unsent.
        """
        since = self._thread.out_of_group_since
        return 0.0 if since is None else time.monotonic() - since

    def why_stuck(self, stuck_seconds: float) -> str | None:
        """Say for how long the consumer's thread has not polled, if that is too long; from any thread."""
        age = time.monotonic() - self._thread.polled_at
        return f"the consumer has not polled for {age:.0f} s" if age > stuck_seconds else None

    def start(
        self, on_records: Callable[[int, list[Message]], None], on_lost: Callable[[Sequence[int]], None]
    ) -> asyncio.Task[None]:
        """Join the group; the task ends with `close`, or with the error that stops the consumer for good.

        `on_records(partition, messages)` gets records in offset order, `on_lost(partitions)` those that are another
        member's now.

        Raises (from the task): as ConsumerThread.run.
        """
        self._on_records, self._on_lost = on_records, on_lost
        self._running = asyncio.create_task(asyncio.to_thread(self._thread.run))
        return self._running

    async def close(self) -> None:
        """Leave the group."""
        self._thread.close()
        if self._running is not None:
            await asyncio.wait([self._running])

    def positions(self) -> Mapping[int, Position]:
        """Return how far each partition that it owns now was delivered."""
        return self._positions

    def release(self, size_bytes: int) -> None:
        """Note that records of this many bytes have been dealt with."""
        self._thread.buffered_bytes -= size_bytes

    def commit(self, partition: int, offset: int) -> None:
        """Tell Kafka, for lag tools only, that everything before `offset` is applied; failures don't matter."""
        self._thread.commit(partition, offset)

    async def seek(self, partition: int, offset: int) -> None:
        """Go back (or on) to an offset of a partition this consumer owns; without effect if it doesn't."""
        try:
            await self._thread.seek(partition, offset)
        except (KafkaException, ServiceUnavailable) as error:
            _log.warning("seek_failed", partition=partition, error=str(error))

    async def ends(self) -> dict[int, int]:
        """Return the end offsets, now, of owned partitions that hold anything beyond where reading started.

        Raises:
            ServiceUnavailable: Kafka did not answer, or the consumer has ended.
        """
        owned = await self._thread.call(lambda consumer: consumer.assignment())
        watermarks = {item.partition: await self._watermarks(item.partition) for item in owned}
        return {n: high for n, (low, high) in watermarks.items() if high > max(low, self._starts.get(n, 0))}

    async def earliest(self, partition: int) -> int:
        """Return the lowest offset that Kafka still has.

        Raises:
            ServiceUnavailable: Kafka did not answer.
        """
        return (await self._watermarks(partition))[0]

    async def _watermarks(self, partition: int) -> tuple[int, int]:
        where = TopicPartition(self._topic, partition)
        try:
            marks = await self._thread.call(lambda consumer: consumer.get_watermark_offsets(where, ANSWER_SECONDS))
        except KafkaException as error:
            raise ServiceUnavailable(f"Kafka did not return its offsets: {error}") from error
        if marks is None:
            raise ServiceUnavailable(f"Kafka did not return its offsets within {ANSWER_SECONDS:g} s")
        return int(marks[0]), int(marks[1])

    def _on_event(self, event: Event) -> None:
        match event:
            case Assigned(offsets):
                self._starts = offsets
                self._positions = {number: Position(max(0, at), max(0, at)) for number, at in offsets.items()}
            case Fetched(partition, messages):
                self._thread.buffered_bytes += buffered_bytes(messages)
                self._advance(partition, messages[-1].offset() + 1, messages[-1].timestamp()[1])
                self._on_records(partition, messages)
            case Ended(partition, offset):
                self._advance(partition, offset, 0)
            case Revoked(partitions):
                self._positions = {}
                self._on_lost(partitions)

    def _advance(self, partition: int, offset: int, timestamp_ms: int) -> None:
        if (before := self._positions.get(partition)) is not None:  # otherwise it was lost meanwhile
            self._positions[partition] = Position(offset, offset, max(before.not_before, timestamp_ms / 1000))


def buffered_bytes(messages: Iterable[Message]) -> int:
    """Return how much of the consumer's buffer records take."""
    return sum(len(message.value() or b"") for message in messages)
