"""A Faust transport that delivers one event per chunk of a partition's records, instead of one per record.

Faust spends about 80 microseconds on each event. Fed with chunks of some thousand records it spends them on the
chunk, and what is left per record is aiokafka's own decoder: 0.4 microseconds.

Non-obvious: this reads private parts of aiokafka (Fetcher._records, FetchResult._partition_records, PartitionRecords'
_records and _records_iterator), so its version is pinned and tests/contract/test_chunks.py holds each part to it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import dropwhile, islice
from typing import Any, Final, NamedTuple

import faust
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException, IllegalStateError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from pipeline.window import Record

# Folding this many records takes some milliseconds: long enough to make Faust's cost per event vanish, short
# enough for heartbeats and timers of the same event loop.
TARGET_RECORDS: Final = 2000
# Records are decoded this many at a time, right before they are folded: they are still in the processor's cache
# then, and their memory serves the next ones. Decoding a whole fetch ahead costs three times as much a record.
RECORDS_PER_SLICE: Final = 500
# A poll takes at most this many chunks, so that one partition's backlog can't fill the memory.
MAX_CHUNKS_PER_POLL: Final = 16


class Chunk(NamedTuple):
    """Consecutive records of one partition: all there are from offset `start` up to, not including, `next_offset`.

    They are still encoded, as Kafka's record batches. Offsets without a record (transaction markers, compaction)
    are possible.
    """

    start: int
    next_offset: int
    batches: list[Any]

    def slices(self) -> Iterator[list[Record]]:
        """Decode and iterate the records, in lists of at most RECORDS_PER_SLICE."""
        for batch in self.batches:
            # The first record batch may begin before the offset that was asked for.
            records = dropwhile(lambda record: record.offset < self.start, iter(batch))
            while decoded := list(islice(records, RECORDS_PER_SLICE)):
                yield decoded
                if len(decoded) < RECORDS_PER_SLICE:
                    break  # aiokafka's iterators can't be asked again once they are exhausted


class PartitionChunks:
    """Stands in for aiokafka's PartitionRecords: iterates a fetch response in chunks, at record batch borders."""

    def __init__(self, partition_records: PartitionRecords) -> None:
        self._records = partition_records._records
        self._tp = partition_records._tp
        self._check_crcs = partition_records._check_crcs
        self.next_fetch_offset: int = partition_records.next_fetch_offset
        # A generator that refers back to its owner and is never run here. Without this each response would stay in
        # memory until Python looks for cycles, which it does by numbers of objects: few large records are no reason.
        partition_records._records_iterator = None

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        start = self.next_fetch_offset
        batches = []
        while self.next_fetch_offset - start < TARGET_RECORDS and self._records.has_next():
            batch = self._records.next_batch()
            if self._check_crcs and not batch.validate_crc():
                raise CorruptRecordException(f"a record batch of {self._tp} fails its CRC check")
            if not batch.is_control_batch:
                batches.append(batch)
            self.next_fetch_offset = batch.next_offset
        if self.next_fetch_offset == start:
            raise StopIteration
        return Chunk(start, self.next_fetch_offset, batches)


class _ChunkedResults(OrderedDict[Any, Any]):
    """The fetcher's buffer of responses; turns each into chunks as it is put in."""

    def __setitem__(self, tp: Any, result: Any) -> None:
        if isinstance(result, FetchResult):
            result._partition_records = PartitionChunks(result._partition_records)
        super().__setitem__(tp, result)


class ChunkConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread that runs aiokafka's consumer."""

    async def on_start(self) -> None:
        """Start the consumer and swap its fetcher's buffer, before there is an assignment to fetch for."""
        await super().on_start()
        self._ensure_consumer()._fetcher._records = _ChunkedResults()


class _ForgetfulOffsets(dict[TP, int]):
    """Stands in for the offsets below which Faust drops a message: it remembers none.

    Faust writes down a message's offset after it has handed it on, over what a seek has set meanwhile, and would drop
    what is read again. The worker compares offsets itself.
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
        # Faust's own calls aiokafka from this thread, in the middle of what the consumer's thread does.
        try:
            await self._thread.seek_wait({partition: offset})
        except IllegalStateError:
            self.log.info("no seek in %r: it was taken away meanwhile", partition)

    async def commit_offsets(self, offsets: Mapping[TP, int]) -> bool:
        """Commit explicit offsets; false if a rebalance has taken a partition away meanwhile.

        Faust's own commits go by acknowledged events, which loses data: its bookkeeping passes unacked ones.
        """
        assignment = self.assignment()
        mine = {tp: offset for tp, offset in offsets.items() if tp in assignment}
        if not mine:
            return False
        committed = await self._thread.commit(mine)
        if committed:
            self._committed_offset.update(mine)
        return bool(committed) and len(mine) == len(offsets)

    def committed_offset(self, tp: TP) -> int | None:
        """Return where this partition was taken up, or None if nothing was ever committed for it."""
        offset: int | None = self._committed_offset[tp]
        return offset


class ChunkTransport(driver.Transport):
    """Faust's aiokafka transport with the chunked consumer."""

    Consumer = ChunkConsumer


class ChunkSchema(faust.Schema):
    """Hands a chunk on as it is: decoding belongs to the fold, where one bad record costs itself alone."""

    def compile(self, app: faust.App, **_: Any) -> Callable[..., Awaitable[Any]]:
        """Return the function that wraps a message in an event."""

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            return app.create_event(None, message.value, message.headers, message)

        return decode


class ChunkApp(faust.App):
    """A Faust app whose topics are all consumed in chunks."""

    def _new_transport(self) -> ChunkTransport:
        return ChunkTransport(self.conf.broker_consumer, self, loop=self.loop)
