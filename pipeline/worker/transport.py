"""A Faust transport that delivers one event per chunk of a partition's records, instead of one per record.

Faust spends about 80 microseconds on each event. Fed chunks of a few thousand records, it spends them once per chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import faust
import structlog
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaTimeoutError
from aiokafka.structs import OffsetAndMetadata
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from pipeline.kafka.chunks import Chunk, fetch_in_chunks

# Committed with an offset: which incarnation of the topic it belongs to.
_NOTE: Final = "topic_id:"
_SOONER_SECONDS: Final = 5.0

_log = structlog.get_logger(__name__)


class ChunkConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread that runs aiokafka's consumer."""

    async def on_start(self) -> None:
        """Start the consumer and swap its fetcher's buffer, before there is an assignment to fetch for."""
        await super().on_start()
        fetch_in_chunks(self._ensure_consumer())

    # The methods below run in this thread.

    async def check_errors(self) -> None:
        """Raise the error that keeps aiokafka out of its group: it waits to be asked, which Faust never does."""
        self._ensure_consumer()._coordinator.check_errors()

    async def commit_for(self, topic_id: str, offsets: Mapping[TP, int]) -> bool:
        """Commit offsets with a note of the topic's id; false if a rebalance has revoked a partition meanwhile."""
        note = _NOTE + topic_id
        noted = {driver.ensure_aiokafka_TP(tp): OffsetAndMetadata(at, note) for tp, at in offsets.items()}
        try:
            await self._ensure_consumer().commit(noted)
        except (CommitFailedError, IllegalStateError):
            return False
        return True

    async def seek_to_committed_for(self, topic_id: str) -> dict[TP, int]:
        """Seek each partition to its committed offset and return the offsets.

        Without a committed offset, or with one that is noted to be of another incarnation, that is the beginning.
        """
        consumer = self._ensure_consumer()
        assignment = consumer.assignment()
        committed = await consumer._coordinator.fetch_committed_offsets(list(assignment))
        begins = {}
        for tp, found in committed.items():
            note = found.metadata or ""
            if note.startswith(_NOTE) and note != _NOTE + topic_id:
                _log.warning("offset_of_a_deleted_topic_ignored", topic=tp.topic, partition=tp.partition)
            else:
                begins[tp] = found.offset
        begins |= await consumer.beginning_offsets(assignment - begins.keys())
        try:
            for tp, offset in begins.items():
                consumer.seek(tp, offset)
        except IllegalStateError:
            return {}  # revoked meanwhile: the next assignment seeks again
        return {TP(*tp): offset for tp, offset in begins.items()}


class _ForgetfulOffsets(dict[TP, int]):
    """Stands in for the offsets below which Faust drops a message: it remembers none.

    Faust notes a message's offset only after it has delivered the message, which may overwrite what a seek has set, and
    would then drop what is read again. SourcePartition compares offsets itself.
    """

    def __missing__(self, tp: TP) -> None:
        return None

    def __setitem__(self, tp: TP, offset: int) -> None:
        pass

    def update(self, *_: Any, **__: Any) -> None:
        pass


class ChunkConsumer(driver.Consumer):
    """Faust's consumer; a message's value is a Chunk, its offset the chunk's first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_offset = _ForgetfulOffsets()
        self.topic_id = ""  # of the events topic; the worker sets it before it starts on partitions

    def _new_consumer_thread(self) -> ChunkConsumerThread:
        return ChunkConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def _to_message(self, tp: TP, record: Chunk) -> ConsumerMessage:
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            record.start,
            0.0,  # each record has its own
            1,  # LogAppendTime
            (),
            None,
            record,
            None,
            tp=tp,
            generation_id=self.app.consumer_generation_id,
        )

    async def _seek(self, partition: TP, offset: int) -> None:
        # Faust's own method calls aiokafka from this thread while the consumer's thread is using it.
        try:
            await self._thread.seek_wait({partition: offset})
        except IllegalStateError:
            self.log.info("no seek in %r: it was revoked meanwhile", partition)

    async def commit_offsets(self, offsets: Mapping[TP, int]) -> bool:
        """Commit explicit offsets; false if a rebalance has revoked a partition meanwhile.

        Faust's own commits follow acknowledged events, and lose data: its bookkeeping skips unacknowledged ones.
        """
        assignment = self.assignment()
        mine = {tp: offset for tp, offset in offsets.items() if tp in assignment}
        if not mine:
            return False
        committed: bool = await self._thread.call_thread(self._thread.commit_for, self.topic_id, mine)
        if committed:
            self._committed_offset.update(mine)
        return committed and len(mine) == len(offsets)

    async def perform_seek(self) -> None:
        """Seek every partition to what is committed for this incarnation of the topic, or else to its beginning.

        Faust's own method leaves a partition where it is while nothing is committed for it, although Faust drops what
        it fetched of it during a rebalance. And Kafka forgets the offsets of a deleted topic, but accepts a late
        commit of them once the topic is recreated. An offset without our note was set by an operator, and counts.

        Raises:
            KafkaTimeoutError: Kafka does not say what is committed, or where partitions begin.
        """
        self._committed_offset.clear()
        try:
            # Sooner than Faust, whose own timeout ends the handling of a rebalance without an error.
            async with asyncio.timeout(self.app.conf.broker_request_timeout - _SOONER_SECONDS):
                begins = await self._thread.call_thread(self._thread.seek_to_committed_for, self.topic_id)
        except TimeoutError:
            raise KafkaTimeoutError("Kafka did not say where the partitions begin") from None
        self._committed_offset.update(begins)

    async def check_errors(self) -> None:
        """Raise what keeps this consumer out of its group, if anything: a right it lacks, an unexpected answer."""
        await self._thread.call_thread(self._thread.check_errors)

    def committed_offset(self, tp: TP) -> int | None:
        """Return what was committed last, or else where reading began; None: not known yet."""
        offset: int | None = self._committed_offset[tp]
        return offset


class ChunkTransport(driver.Transport):
    """Faust's aiokafka transport with the chunked consumer."""

    Consumer = ChunkConsumer


class ChunkSchema(faust.Schema):
    """Passes a chunk on as it is: the fold decodes it, so that one bad record affects nothing else."""

    def compile(self, app: faust.App, **_: Any) -> Callable[..., Awaitable[Any]]:
        """Return the function that wraps a message in an event."""

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            return app.create_event(None, message.value, message.headers, message)

        return decode


class ChunkApp(faust.App):
    """A Faust app whose topics are all consumed in chunks."""

    def _new_transport(self) -> ChunkTransport:
        return ChunkTransport(self.conf.broker_consumer, self, loop=self.loop)

    def _create_directories(self) -> None:
        """Make none: nothing is stored on disk, which may be read-only."""
