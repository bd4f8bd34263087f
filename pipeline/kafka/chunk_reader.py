"""Read ranges of a topic's records in the worker's chunks, without any effect on consumer groups."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Final, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import ClusterAuthorizationFailedError, KafkaError, TopicAuthorizationFailedError

from pipeline.core.record import Record
from pipeline.errors import ConfigError, ServiceUnavailable
from pipeline.kafka.chunks import FETCH_BYTES, Chunk, fetch_in_chunks
from pipeline.kafka.range_reader import OffsetRange

_READ_SECONDS: Final = 0.2
# aiokafka retries forever; give up after a minute of silence.
_SILENCE_SECONDS: Final = 60.0
_REFUSALS: Final = (TopicAuthorizationFailedError, ClusterAuthorizationFailedError)


class ChunkReader:
    """Reads one range of offsets after another, of one partition each; joins no group and commits nothing.

    As an async context manager it is started and stopped with the block.
    """

    def __init__(self, servers: Sequence[str], security: Mapping[str, Any], topic: str) -> None:
        """Make a reader; `security` is what credentials.aiokafka_security returns."""
        self.topic = topic
        self.position = 0
        self._end = 0
        self._last_answer_at = 0.0
        self._partition = TopicPartition(topic, -1)
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=list(servers),
            **security,
            client_id="agent-metadata-replay",
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # retention may overtake a slow reader
            max_partition_fetch_bytes=FETCH_BYTES,
            # At a partition's end a fetch waits this long for more, and the next partition waits behind it.
            fetch_max_wait_ms=10,
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Connect.

        Raises:
            ServiceUnavailable: Kafka does not answer.
        """
        try:
            await self._consumer.start()
        except KafkaError as error:
            await self._consumer.stop()
            raise ServiceUnavailable(f"Kafka can't be read: {error}") from error
        fetch_in_chunks(self._consumer)

    async def stop(self) -> None:
        """Close the connections."""
        await self._consumer.stop()

    def open(self, offsets: OffsetRange) -> None:
        """Start on a range; the rest of the previous one is dropped."""
        self._partition = TopicPartition(self.topic, offsets.partition)
        self.position, self._end = offsets.start, offsets.end
        self._last_answer_at = time.monotonic()
        self._consumer.assign([self._partition])
        self._consumer.seek(self._partition, offsets.start)

    @property
    def is_done(self) -> bool:
        """Tell whether the open range is read to its end."""
        return self.position >= self._end

    async def read(self) -> Iterator[list[Record]]:
        """Return the next records in offset order, in lists of one record batch each; none if none arrived in 0.2 s.

        A record batch that can't be unpacked is one record, which can't be decoded.
        They are decoded, and `position` advances, as they are iterated, which may be done in a thread.

        Raises:
            ConfigError: this user may not read the topic.
            ServiceUnavailable: Kafka is unavailable, or has sent nothing for 60 s.
        """
        try:
            fetched = await self._consumer.getmany(timeout_ms=round(_READ_SECONDS * 1000))
            if not fetched:
                await self._skip_deleted_records()
        except _REFUSALS as error:
            raise ConfigError(f"Kafka refused to let us read {self.topic}: {error}") from error
        except KafkaError as error:
            raise ServiceUnavailable(f"reading {self.topic} failed: {error}") from error
        if fetched:
            self._last_answer_at = time.monotonic()
        elif time.monotonic() - self._last_answer_at > _SILENCE_SECONDS:
            raise ServiceUnavailable(
                f"Kafka sent no record of {self.topic} for {_SILENCE_SECONDS:g} s; is it up? Does the topic exist?"
            )
        return self._slices(fetched.get(self._partition, []))

    async def _skip_deleted_records(self) -> None:
        """Follow aiokafka past records that retention has deleted: there may be none after them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READ_SECONDS):
                self.position = max(self.position, await self._consumer.position(self._partition))

    def _slices(self, chunks: Sequence[Chunk]) -> Iterator[list[Record]]:
        refused: list[Record] = []
        for chunk in chunks:
            for decoded in chunk.slices(lambda record, _: refused.append(record)):
                records = decoded or [refused.pop()]  # an empty list follows each that is refused
                if records[-1].offset >= self._end:
                    records = list(takewhile(lambda record: record.offset < self._end, records))
                if records:
                    self.position = records[-1].offset + 1
                    yield records
            self.position = min(chunk.next_offset, self._end)
