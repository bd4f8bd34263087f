"""aiokafka's fetcher, changed to return chunks of a partition's records instead of single records.

What is left per record is aiokafka's own decoder, 0.4 microseconds: a third of what a librdkafka message costs. Records
of aborted transactions are left out, and those of open ones wait in Kafka, as for any consumer that reads committed
records only.

Non-obvious: this reads and sets private parts of aiokafka (Fetcher's _records and _isolation_level, FetchResult's
_partition_records, PartitionRecords' _records, _records_iterator and _aborted_transactions, its decompression), so its
version is pinned and test_aiokafka_contract.py checks each part.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import dropwhile, islice
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaConsumer
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record import default_records
from aiokafka.record.control_record import ABORT_MARKER, ControlRecord

from pipeline.core.compression import PackedTooTightly, unpack_gzip, unpack_lz4, unpack_zstd
from pipeline.core.record import KafkaRecord, Record

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

    They are still encoded, as Kafka's record batches. Offsets without a record (aborted transactions, markers,
    compaction) are possible.
    """

    start: int
    next_offset: int
    batches: list[Any]

    def slices(self, refuse: Callable[[Record, str], None]) -> Iterator[list[Record]]:
        """Decode and iterate the records, in lists of at most RECORDS_PER_SLICE.

        A record batch that can't be unpacked goes to `refuse` with the reason, as one record: its value holds the
        batch's records as they came. An empty list follows, as its time has to be shared.
        """
        for batch in self.batches:
            try:
                unpacked = iter(batch)
            except PackedTooTightly as error:
                refuse(*self._refused(batch, error))
                yield []
                continue
            # The first record batch may begin before the offset that was asked for.
            records = dropwhile(lambda record: record.offset < self.start, unpacked)
            while decoded := list(islice(records, RECORDS_PER_SLICE)):
                yield decoded
                if len(decoded) < RECORDS_PER_SLICE:
                    break  # aiokafka's iterators can't be asked again once they are exhausted

    def _refused(self, batch: Any, error: PackedTooTightly) -> tuple[Record, str]:
        offset = max(self.start, batch.base_offset)
        reason = f"a record batch with the offsets {batch.base_offset} to {batch.next_offset - 1} {error}"
        record = KafkaRecord(offset, batch.max_timestamp, None, error.packed, timestamp_type=batch.timestamp_type)
        return record, reason


class PartitionChunks:
    """Stands in for aiokafka's PartitionRecords: iterates a fetch response in chunks, at record batch borders.

    Guarantee: what was asked for with READ_COMMITTED holds no record of an aborted transaction.
    """

    def __init__(self, partition_records: PartitionRecords) -> None:
        self._records = partition_records._records
        self._tp = partition_records._tp
        self._check_crcs = partition_records._check_crcs
        # (producer id, first offset) of each aborted transaction that the response may hold, by offset.
        self._aborted: deque[tuple[int, int]] = deque(partition_records._aborted_transactions)
        self._aborted_producers: set[int] = set()
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
            is_filtering = self._aborted or self._aborted_producers
            if not (is_filtering and self._is_aborted(batch)) and not batch.is_control_batch:
                batches.append(batch)
            self.next_fetch_offset = batch.next_offset
        if self.next_fetch_offset == start:
            raise StopIteration
        return Chunk(start, self.next_fetch_offset, batches)

    def _is_aborted(self, batch: Any) -> bool:
        """Tell whether a record batch is of an aborted transaction; to be asked of each one, in order.

        Source: Kafka's own consumer. A producer is in an aborted transaction from its first offset to its marker.
        """
        while self._aborted and self._aborted[0][1] <= batch.base_offset:
            self._aborted_producers.add(self._aborted.popleft()[0])
        if batch.producer_id not in self._aborted_producers:
            return False
        if batch.is_control_batch and _is_abort(batch):
            self._aborted_producers.discard(batch.producer_id)
        return bool(batch.is_transactional)


def _is_abort(control_batch: Any) -> bool:
    return bool(ControlRecord.parse(next(iter(control_batch)).key) == ABORT_MARKER)


class _ChunkedResults(OrderedDict[Any, Any]):
    """The fetcher's buffer of responses; turns each into chunks as it is put in."""

    def __setitem__(self, tp: Any, result: Any) -> None:
        if isinstance(result, FetchResult):
            result._partition_records = PartitionChunks(result._partition_records)
        super().__setitem__(tp, result)


def fetch_in_chunks(consumer: AIOKafkaConsumer) -> None:
    """Have a consumer's methods return Chunks instead of records; to be called before it has anything to fetch.

    Its offsets end, from then on, where the first open transaction begins (Kafka's last stable offset).
    """
    consumer._fetcher._records = _ChunkedResults()
    consumer._fetcher._isolation_level = READ_COMMITTED
    _bound_unpacking()


def _bound_unpacking() -> None:
    """Replace the functions that aiokafka unpacks with; snappy's format itself allows at most 22 times the size."""
    decoder = sys.modules[default_records.DefaultRecordBatch.__module__]
    for name, unpack in (("gzip", unpack_gzip), ("lz4", unpack_lz4), ("zstd", unpack_zstd)):
        setattr(decoder, f"{name}_decode", unpack)
