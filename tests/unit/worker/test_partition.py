import asyncio
import uuid
from datetime import UTC, datetime, timedelta

import faust
import pytest

from pipeline.core.window import MAX_REJECTED_BYTES
from pipeline.testing import FakeRecord, ManualClock, record, settle
from pipeline.worker.partition import MAX_WAITING, SourcePartition
from pipeline.worker.table import LatestTable, LatestTables

T0 = datetime(2024, 1, 1, tzinfo=UTC)
AGENTS = [uuid.UUID(int=number) for number in range(1, 100)]


class Outlet:
    """Takes closed windows; can be told to hold them, as Kafka does while it is away."""

    def __init__(self):
        self.windows = []
        self.failures = []
        self.open = asyncio.Event()
        self.open.set()

    async def deliver(self, number, closed):
        await self.open.wait()
        self.windows.append(closed)

    def seen(self):
        return [(closed.reason, closed.first, closed.last, len(closed.rows)) for closed in self.windows]


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
async def make(clock):
    made = []

    def make(number=0, *, capacity=1000, size=5.0, partitions=1):
        app = faust.App("test", Table=LatestTable, TableManager=LatestTables, store="memory://")
        table = app.Table("t", partitions=partitions, capacity=capacity, max_clock_skew=timedelta(60)).tumbling(size)
        outlet = Outlet()
        partition = SourcePartition(
            number, windows=table, clock=clock, deliver=outlet.deliver, on_failure=outlet.failures.append
        )
        made.append(partition)
        return partition, outlet

    yield make
    for partition in made:
        await partition.abandon()


async def take(partition, *records):
    await partition.take(records)


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


async def test_finish_brings_everything_out(make):
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
    garbage = [FakeRecord(offset, 0, None, b"x" * MAX_REJECTED_BYTES) for offset in range(2)]
    taking = asyncio.create_task(take(partition, *garbage))
    await settle()
    assert not taking.done()
    outlet.open.set()
    await taking
    assert outlet.seen() == [("capacity", 0, 0, 0), ("capacity", 1, 1, 0)]


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


async def test_delivery_that_fails_is_reported_and_nothing_more_delivered(make, clock):
    partition, outlet = make()

    async def refuse(number, closed):
        raise RuntimeError("refused")

    partition._deliver = refuse
    await settle()
    await take(partition, record(0, AGENTS[0], T0, k="v"))
    await clock.advance(5)
    assert [str(error) for error in outlet.failures] == ["refused"]
