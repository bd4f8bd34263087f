"""aiokafka's fetcher, changed to return chunks of a partition's records instead of single records.

What is left per record is aiokafka's own decoder, 0.4 microseconds: a third of what a librdkafka message costs.

Non-obvious: this reads private parts of aiokafka (Fetcher._records, FetchResult._partition_records, PartitionRecords'
_records and _records_iterator), so its version is pinned and test_aiokafka_contract.py checks each part.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import dropwhile, islice
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaConsumer
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException

from pipeline.core.record import Record

# Folding this many records takes a few milliseconds: long enough to make Faust's cost per event vanish, short
# enough for heartbeats and timers of the same event loop.
TARGET_RECORDS: Final = 2000
# Records are decoded this many at a time, right before they are folded: they are still in the processor's cache
# then, and their memory serves the next ones. Decoding a whole fetch ahead costs three times as much per record.
RECORDS_PER_SLICE: Final = 500
# How many bytes of a partition a fetch asks for: large enough to keep round trips rare.
FETCH_BYTES: Final = 4 * 1024 * 1024
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
        # memory until Python looks for cycles, which object counts trigger: a few large records don't.
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


def fetch_in_chunks(consumer: AIOKafkaConsumer) -> None:
    """Have a consumer's methods return Chunks instead of records; to be called before it has anything to fetch."""
    consumer._fetcher._records = _ChunkedResults()
