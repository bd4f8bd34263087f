import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
from faust.types import TP
from prometheus_client import CollectorRegistry

from pipeline.core.decoding import RecordDecoder, SchemaNeeded
from pipeline.core.record import KafkaRecord
from pipeline.core.tumbling import TumblingWindows
from pipeline.core.window import MAX_REJECTED_BYTES
from pipeline.errors import ConfigError, ServiceUnavailable, TopicMismatch
from pipeline.monitoring.lag import Position
from pipeline.monitoring.metrics import WorkerMetrics
from pipeline.testing import ManualClock, record, settle
from pipeline.worker.partition import MAX_WAITING, SourcePartition

T0 = datetime(2024, 1, 1, tzinfo=UTC)
AGENTS = [uuid.UUID(int=number) for number in range(1, 100)]


class Outlet:
    """Takes closed windows; can be told to hold them, as Kafka does while it is down."""

    def __init__(self):
        self.windows = []
        self.failures = []
        self.open = asyncio.Event()
        self.open.set()

    async def deliver(self, number, closed):
        await self.open.wait()
        self.windows.append(closed)

    async def refuse(self, number, closed):
        raise RuntimeError("refused")

    def seen(self):
        return [(closed.reason, closed.first, closed.last, len(closed.rows)) for closed in self.windows]


class Topic:
    """What the consumer says of the partition: what is committed, and which offsets Kafka has."""

    def __init__(self, *, committed=None, earliest=0, end=0):
        self.committed = committed
        self.earliest = earliest
        self.end = end
        self.seeks = []

    def committed_offset(self, tp):
        return self.committed

    def highwater(self, tp):
        return self.end

    async def earliest_offsets(self, tp):
        return {tp: self.earliest}

    async def seek(self, tp, offset):
        self.seeks.append(offset)


class Chunk(NamedTuple):
    start: int
    next_offset: int
    records: list

    def slices(self, refuse):
        records = [record for record in self.records if record.offset >= self.start]
        return [records] if records else []


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
async def make(clock, registry):
    made = []
    metrics = WorkerMetrics(registry)

    def make(
        number=0, *, capacity=1000, size=5.0, partitions=1, topic=None, backlog_end=0, is_refusing=False, decoder=None
    ):
        outlet = Outlet()
        partition = SourcePartition(
            TP("events", number),
            consumer=topic or Topic(),
            backlog_end=backlog_end,
            decoder=decoder or RecordDecoder(),
            windows=TumblingWindows(size, partitions, capacity, timedelta(60)),
            clock=clock,
            metrics=metrics,
            deliver=outlet.refuse if is_refusing else outlet.deliver,
            on_failure=outlet.failures.append,
        )
        made.append(partition)
        return partition, outlet

    yield make
    for partition in made:
        await partition.abandon()


class Registry(RecordDecoder):
    """Needs a schema for each record; `error` is what asking for one raises, until it is None."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.asked = 0
        self.is_loaded = False

    def reset(self):
        self.parse = lambda raw: {}["nothing is plain"]

    def decode(self, record):
        if not self.is_loaded:
            raise SchemaNeeded(7)
        return super().decode(record)

    def load(self, schema_id):
        self.asked += 1
        if self.error is not None:
            raise self.error
        self.is_loaded = True


async def asked(decoder, clock, times):
    """Let time pass until the registry was asked so often, by another thread, and what it did is known here."""
    while decoder.asked < times:
        await clock.advance(1)
        await asyncio.to_thread(lambda: None)


async def take(partition, *records):
    await partition.take(Chunk(records[0].offset, records[-1].offset + 1, records))


def reports(*offsets):
    return [record(offset, AGENTS[offset], T0, k="v") for offset in offsets]


async def test_window_closes_by_the_clock_at_its_end(make, clock):
    partition, outlet = make()
    await settle()
    await take(partition, record(0, AGENTS[0], T0, k="v"))
    await clock.advance(4.999)
    assert outlet.seen() == []
    await clock.advance(0.001)
    assert outlet.seen() == [("scheduled", 0, 0, 1)]


async def test_empty_window_delivers_nothing(make, clock):
    _, outlet = make()
    await clock.advance(60)
    assert outlet.seen() == []


async def test_windows_tumble_from_end_to_end(make, clock):
    partition, outlet = make()
    for offset in range(3):
        await settle()
        await take(partition, record(offset, AGENTS[0], T0, k="v"))
        await clock.advance(5)
    assert [(closed.start, closed.end) for closed in outlet.windows] == [
        (1_704_067_200 + start, 1_704_067_205 + start) for start in (0, 5, 10)
    ]


async def test_sub_second_windows_close_on_time(make, clock):
    partition, outlet = make(size=0.2)
    await settle()
    await take(partition, record(0, AGENTS[0], T0, k="v"))
    await clock.advance(0.2)
    assert outlet.seen() == [("scheduled", 0, 0, 1)]


async def test_first_window_lasts_its_length_whatever_the_phase(make, clock):
    await clock.advance(1.5)
    partition, outlet = make()
    await settle()
    await take(partition, record(0, AGENTS[0], T0, k="v"))
    await clock.advance(4.9)
    assert outlet.seen() == []
    await clock.advance(0.1)
    assert outlet.seen() == [("scheduled", 0, 0, 1)]


async def test_partitions_close_at_phases_of_their_own(make, clock):
    made = [make(number, partitions=4, size=4.0) for number in range(4)]
    await settle()
    await clock.advance(4)
    for partition, _ in made:
        await take(partition, record(0, AGENTS[0], T0, k="v"))
    closed = []
    for _ in range(4):
        await clock.advance(1)
        closed.append([number for number, (_, outlet) in enumerate(made) if outlet.windows])
    assert closed == [[1], [1, 2], [1, 2, 3], [0, 1, 2, 3]]


async def test_window_closes_at_capacity_and_the_next_lasts_its_full_length(make, clock):
    partition, outlet = make(capacity=2)
    await settle()
    await clock.advance(4)
    await take(partition, *(record(offset, AGENTS[offset], T0, k="v") for offset in range(3)))
    await settle()
    assert outlet.seen() == [("capacity", 0, 1, 2)]
    await clock.advance(4.9)
    assert len(outlet.windows) == 1
    await clock.advance(0.1)
    assert outlet.seen()[1:] == [("scheduled", 2, 2, 1)]


async def test_finish_delivers_everything(make):
    partition, outlet = make()
    await take(partition, record(0, AGENTS[0], T0, k="v"))
    await partition.finish("shutdown")
    assert outlet.seen() == [("shutdown", 0, 0, 1)]


async def test_finish_ends_when_a_delivery_fails(make):
    partition, outlet = make()
    outlet.open.clear()
    await take(partition, record(0, AGENTS[0], cpu="1"))
    finishing = asyncio.create_task(partition.finish("shutdown"))
    await settle()
    assert not finishing.done()
    outlet.windows = None  # what `deliver` can't append to
    outlet.open.set()
    await asyncio.wait_for(finishing, 5)
    (failure,) = outlet.failures
    assert isinstance(failure, AttributeError)


async def test_take_waits_while_too_many_windows_are_not_safe(make):
    partition, outlet = make(capacity=1)
    outlet.open.clear()
    records = [record(offset, AGENTS[offset], T0, k="v") for offset in range(10)]
    taking = asyncio.create_task(take(partition, *records))
    await settle()
    assert not taking.done()
    outlet.open.set()
    await taking
    await partition.finish("shutdown")
    assert outlet.seen() == [("capacity", offset, offset, 1) for offset in range(10)]
    assert MAX_WAITING < 10


async def test_take_waits_for_large_rejected_records_to_be_safe_before_it_takes_more(make):
    partition, outlet = make()
    outlet.open.clear()
    garbage = [KafkaRecord(offset, 0, None, b"x" * MAX_REJECTED_BYTES) for offset in range(2)]
    taking = asyncio.create_task(take(partition, *garbage))
    await settle()
    assert not taking.done()
    assert partition.is_held
    outlet.open.set()
    await taking
    assert outlet.seen() == [("capacity", 0, 0, 0), ("capacity", 1, 1, 0)]
    assert not partition.is_held


async def test_abandon_while_kafka_is_away_lets_the_reader_go(make):
    partition, outlet = make(capacity=1)
    outlet.open.clear()
    records = [record(offset, AGENTS[offset], T0, k="v") for offset in range(10)]
    taking = asyncio.create_task(take(partition, *records))
    await settle()
    finishing = asyncio.create_task(partition.finish("revoked"))
    await settle()
    assert taking.done()
    finishing.cancel()
    await partition.abandon()
    assert outlet.seen() == []


async def test_record_waits_for_its_schema_while_the_registry_is_away(make, clock):
    decoder = Registry(ServiceUnavailable("the registry is away"))
    partition, outlet = make(decoder=decoder)
    taking = asyncio.create_task(take(partition, *reports(0, 1)))
    await asked(decoder, clock, 1)
    began = partition.loading_since
    await asked(decoder, clock, 9)  # windows go on closing meanwhile
    assert (partition.is_held, partition.loading_since, taking.done()) == (True, began, False)
    decoder.error = None
    while not taking.done():
        await clock.advance(1)
        await asyncio.to_thread(lambda: None)
    assert (partition.is_held, partition.loading_since) == (False, None)
    await partition.finish("shutdown")
    assert outlet.seen() == [("shutdown", 0, 1, 2)]


async def test_partition_that_waits_for_a_schema_can_be_finished(make, clock):
    decoder = Registry(ServiceUnavailable("the registry is away"))
    partition, outlet = make(decoder=decoder)
    taking = asyncio.create_task(take(partition, *reports(0, 1)))
    await asked(decoder, clock, 1)
    await partition.finish("revoked")
    while not taking.done():
        await clock.advance(1)
        await asyncio.to_thread(lambda: None)
    assert outlet.seen() == []
    assert partition.window.entries == 0


async def test_registry_that_refuses_us_ends_the_worker(make):
    partition, _ = make(decoder=Registry(ConfigError("the registry refuses us")))
    with pytest.raises(ConfigError, match="refuses us"):
        await take(partition, *reports(0))


async def test_delivery_that_fails_is_reported_and_nothing_more_delivered(make, clock):
    partition, outlet = make(is_refusing=True)
    await settle()
    await take(partition, record(0, AGENTS[0], T0, k="v"))
    await clock.advance(5)
    assert [str(error) for error in outlet.failures] == ["refused"]


async def test_chunk_read_twice_is_folded_once(make):
    partition, outlet = make(topic=Topic(end=4))
    await take(partition, *reports(0, 1, 2))
    await take(partition, *reports(0, 1, 2))
    await partition.take(Chunk(1, 4, reports(1, 2, 3)))
    await partition.finish("shutdown")
    (closed,) = outlet.windows
    assert (closed.first, closed.last, closed.entries) == (0, 3, 4)


async def test_first_chunk_has_to_follow_what_is_committed(make):
    topic = Topic(committed=2, end=5)
    partition, outlet = make(topic=topic)
    assert partition.position == Position(2, 2)
    await take(partition, *reports(3, 4))
    assert topic.seeks == [2]
    await take(partition, *reports(2, 3, 4))
    await partition.finish("shutdown")
    assert outlet.seen() == [("shutdown", 2, 4, 3)]
    assert partition.position.next_offset == 5


async def test_records_lost_to_retention_are_counted_and_reading_goes_on(make, registry):
    partition, outlet = make(topic=Topic(committed=2, earliest=5, end=7))
    await take(partition, *reports(5, 6))
    await partition.finish("shutdown")
    assert outlet.seen() == [("shutdown", 5, 6, 2)]
    assert registry.get_sample_value("agent_metadata_retention_lost_records_total") == 3


async def test_chunk_of_a_recreated_topic_is_refused(make):
    partition, _ = make(topic=Topic(committed=5, end=1))
    with pytest.raises(TopicMismatch, match="events was recreated"):
        await take(partition, *reports(0))


async def test_backlog_is_delivered_as_soon_as_it_is_read(make, clock):
    await clock.advance(1)
    partition, outlet = make(backlog_end=2)
    await settle()
    await clock.advance(2)
    await take(partition, *reports(0))
    await settle()
    assert outlet.seen() == []
    await take(partition, *reports(1))
    await settle()
    assert outlet.seen() == [("scheduled", 0, 1, 2)]
    await take(partition, *reports(2))
    await clock.advance(2.9)
    assert len(outlet.windows) == 1
    await clock.advance(0.1)  # where the first window would have ended
    assert outlet.seen()[1:] == [("scheduled", 2, 2, 1)]


class Gap(NamedTuple):
    """A chunk without records: transaction markers, or records of an aborted transaction."""

    start: int
    next_offset: int

    def slices(self, refuse):
        return []


class TooLarge(NamedTuple):
    """A chunk of one record batch that can't be unpacked."""

    start: int
    next_offset: int

    def slices(self, refuse):
        refuse(KafkaRecord(self.start, 1_704_067_200_000, None, b"packed"), "it is too large")
        return [[]]


async def test_window_covers_the_markers_behind_its_records(make):
    partition, outlet = make()
    await take(partition, *reports(0, 1))
    await partition.take(Gap(2, 4))
    await partition.finish("shutdown")
    assert outlet.seen() == [("shutdown", 0, 3, 2)]


async def test_offsets_without_any_record_are_delivered_to_be_committed(make):
    partition, outlet = make()
    await partition.take(Gap(0, 4))
    await partition.take(Gap(4, 6))
    await partition.finish("shutdown")
    assert outlet.seen() == [("shutdown", 0, 5, 0)]


async def test_markers_behind_a_window_closed_at_capacity_are_the_nexts(make):
    partition, outlet = make(capacity=2)
    await partition.take(Chunk(0, 5, reports(0, 1)))
    await partition.finish("shutdown")
    assert outlet.seen() == [("capacity", 0, 1, 2), ("shutdown", 2, 4, 0)]


async def test_record_batch_that_is_too_large_is_rejected_alone(make, clock):
    partition, outlet = make()
    await take(partition, *reports(0))
    await partition.take(TooLarge(1, 9))
    await take(partition, *reports(9))
    await partition.finish("shutdown")
    assert outlet.seen() == [("shutdown", 0, 9, 2)]
    (rejected,) = outlet.windows[0].rejected
    assert (rejected.record.offset, rejected.reason) == (1, "it is too large")


async def test_record_batch_that_is_too_large_alone_is_delivered(make, clock):
    partition, outlet = make()
    await settle()
    await partition.take(TooLarge(0, 9))
    await clock.advance(5)
    assert outlet.seen() == [("scheduled", 0, 8, 0)]
    assert len(outlet.windows[0].rejected) == 1
