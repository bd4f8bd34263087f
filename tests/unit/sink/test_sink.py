"""The sink, with a consumer and a store that the test provides."""

import asyncio
import uuid
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry

from pipeline.core.batch import Batch, Row, Source, WindowSpan, encode_batch, split
from pipeline.core.report import MAX_TIMESTAMP_US, agent_uuid
from pipeline.errors import ConfigError, FlushFailed, ProgressGap, RowRejected, ServiceUnavailable, TopicMismatch
from pipeline.monitoring.lag import Position
from pipeline.monitoring.metrics import SinkMetrics
from pipeline.postgres.store import Applied
from pipeline.sink import Sink
from tests.support.deployment import eventually


class Record(NamedTuple):
    at: int

    def offset(self):
        return self.at

    def value(self):
        return encode_batch(Batch(Source("e", "id", 0, 0, 0), WindowSpan(0, 1), "scheduled", 1, 1, [], [], [], [], []))


class Topic:
    """A batches topic of five records, and how far they are applied."""

    def __init__(self):
        self.seeks = 0
        self.unanswered = 0
        self.buffered = 0
        self.applied = 0
        self.is_done = asyncio.Event()

    def receive(self, *offsets):
        records = [Record(offset) for offset in offsets]
        self.buffered += sum(len(record.value()) for record in records)
        self.sink.take(0, records)

    def release(self, size_bytes):
        self.buffered -= size_bytes

    def commit(self, partition, offset): ...

    async def seek(self, partition, offset):
        self.seeks += 1
        self.receive(3, 4)  # polled before the consumer had gone back
        await asyncio.sleep(0)
        if self.seeks < 10:
            self.receive(*range(offset, 5))

    async def earliest(self, partition):
        if self.unanswered:
            self.unanswered -= 1
            raise ServiceUnavailable("Kafka did not return its offsets")
        return 0

    async def ends(self):
        return {0: 5}

    async def apply(self, partition, received, reject, *, earliest):
        if received[0][0] > self.applied:
            raise ProgressGap(self.applied, received[0][0])
        self.applied = received[-1][0] + 1
        if self.applied == 5:
            self.is_done.set()
        return Applied()


@pytest.fixture
async def topic():
    topic = Topic()
    failures = []
    topic.sink = Sink(
        consumer=topic,
        topic=topic,
        dead_letters=None,
        metrics=SinkMetrics(CollectorRegistry()),
        on_failure=failures.append,
    )
    yield topic
    topic.sink.lose([0])
    assert failures == []
    assert topic.buffered == 0


async def test_records_that_arrive_before_the_consumer_went_back_are_dropped(topic):
    topic.receive(2)
    await asyncio.wait_for(topic.is_done.wait(), 10)
    assert topic.seeks == 1


async def test_gap_while_kafka_is_away_is_held_until_it_answers(topic):
    topic.unanswered = 1
    topic.receive(2)
    await asyncio.wait_for(topic.is_done.wait(), 10)


async def test_right_that_is_taken_away_and_given_back_holds_batches_and_ends_nothing(topic):
    apply = topic.apply
    refusals = [ConfigError("permission denied for table workspace_agent_metadata (SQLSTATE 42501)")]

    async def refuse_first(*arguments, **options):
        if refusals:
            raise refusals.pop()
        return await apply(*arguments, **options)

    topic.apply = refuse_first
    topic.receive(*range(5))
    await asyncio.wait_for(topic.is_done.wait(), 10)


async def test_drain_does_not_wait_for_a_writer_that_has_failed():
    async def apply(*_, **__):
        raise TopicMismatch("recreated")

    failures = []
    topic = Topic()
    topic.apply = apply
    sink = Sink(
        consumer=topic,
        topic=topic,
        dead_letters=None,
        metrics=SinkMetrics(CollectorRegistry()),
        on_failure=failures.append,
    )
    sink.take(0, [Record(0)])
    assert await asyncio.wait_for(sink.drain(60), 5) is False
    (failure,) = failures
    assert isinstance(failure, TopicMismatch)
    sink.lose([0])


async def test_failed_flushes_and_their_payloads_are_counted():
    registry = CollectorRegistry()
    done = asyncio.Event()
    failures = [FlushFailed("at the commit", payloads=3), ServiceUnavailable("before the NOTIFY")]

    async def apply(partition, received, reject, *, earliest):
        if failures:
            raise failures.pop(0)
        done.set()
        return Applied()

    topic = Topic()
    topic.apply = apply
    topic.sink = Sink(
        consumer=topic,
        topic=topic,
        dead_letters=None,
        metrics=SinkMetrics(registry),
        on_failure=pytest.fail,
    )
    topic.receive(0)
    await asyncio.wait_for(done.wait(), 30)
    topic.sink.lose([0])
    assert registry.get_sample_value("agent_metadata_failed_flushes_total") == 2
    assert registry.get_sample_value("agent_metadata_publish_errors_total") == 3


class RawRecord(NamedTuple):
    at: int
    raw: bytes

    def offset(self):
        return self.at

    def value(self):
        return self.raw

    def timestamp(self):
        return (1, 1_704_067_200_000)


class BatchRecord(RawRecord):
    def key(self):
        return None

    def headers(self):
        return []


class Partitions(Topic):
    """A batches topic of two partitions; notes what is applied of each."""

    def __init__(self, registry):
        super().__init__()
        self.reached = {0: [], 1: []}
        self.sink = Sink(
            consumer=self, topic=self, dead_letters=None, metrics=SinkMetrics(registry), on_failure=pytest.fail
        )

    def receive(self, partition, *records):
        self.buffered += sum(len(record.value()) for record in records)
        self.sink.take(partition, records)

    def positions(self):
        return {0: Position(9, 9), 1: Position(9, 9)}

    async def ends(self):
        return {0: 5, 1: 2}

    async def apply(self, partition, received, reject, *, earliest):
        self.reached[partition] += [record.offset for record in received]
        return Applied()


async def test_partition_is_held_at_a_newer_batch_and_others_go_on():
    registry = CollectorRegistry()
    topic = Partitions(registry)
    newer = RawRecord(2, b'{"version": 2}')
    topic.receive(0, Record(0), Record(1), newer, Record(3))
    await eventually("it is held", lambda: topic.sink.why_upgrade)
    topic.receive(0, Record(4))
    topic.receive(1, Record(0), Record(1))
    await eventually("the other goes on", lambda: topic.reached[1] == [0, 1])
    assert topic.reached[0] == [0, 1]
    assert topic.sink.why_upgrade.startswith("partitions [0] wait at a batch of version 2, ")
    assert registry.get_sample_value("agent_metadata_held_partitions") == 1
    assert not topic.sink.is_holding  # that would be an outage of Postgres
    assert topic.buffered == len(newer.raw)  # so what waits behind it does not fill the sink
    assert topic.sink.positions()[0] == Position(2, 9, 1_704_067_200)  # the lag shows, and reading goes on
    assert await asyncio.wait_for(topic.sink.drain(60), 5) is False
    topic.sink.lose([0, 1])
    assert topic.sink.why_upgrade is None
    assert (topic.buffered, registry.get_sample_value("agent_metadata_held_partitions")) == (0, 0)


async def test_drain_of_other_partitions_is_waited_for_beside_a_held_one():
    topic = Partitions(CollectorRegistry())
    is_open = asyncio.Event()
    apply = topic.apply

    async def apply_later(*arguments, **options):
        await is_open.wait()
        return await apply(*arguments, **options)

    topic.apply = apply_later
    topic.receive(0, RawRecord(0, b'{"version": 2}'))
    topic.receive(1, Record(0), Record(1))
    await eventually("it is held", lambda: topic.sink.why_upgrade)
    draining = asyncio.create_task(topic.sink.drain(60))
    await asyncio.sleep(0)
    is_open.set()
    assert await asyncio.wait_for(draining, 5) is False
    assert topic.reached == {0: [], 1: [0, 1]}
    topic.sink.lose([0, 1])


class DeadLetters:
    """Notes which agent each dead letter is of."""

    def __init__(self):
        self.agents = []

    async def write_row(self, partition, row, error):
        self.agents.append(row.agent_id)

    async def write_record(self, partition, record, reason):
        self.agents.append(record.key.decode())
        return asyncio.sleep(0)


async def test_dead_letters_of_rows_are_not_of_another_agent_by_a_wrong_name():
    """A redrive would write another agent's row."""
    own, named = str(uuid.UUID(int=7)), agent_uuid("host-17")
    topic, dead_letters, is_applied = Topic(), DeadLetters(), asyncio.Event()

    async def apply(partition, received, reject, *, earliest):
        for agent_id in (own, named):
            await reject(Row(agent_id, "cpu", "v", "", 1), RowRejected("refused", sqlstate="23514"))
        is_applied.set()
        return Applied()

    topic.apply = apply
    topic.sink = Sink(
        consumer=topic,
        topic=topic,
        dead_letters=dead_letters,
        metrics=SinkMetrics(CollectorRegistry()),
        on_failure=pytest.fail,
    )
    times = {"cpu": 1, "mem": MAX_TIMESTAMP_US + 1}
    rows = [Row(agent_id, key, "v", "", at) for agent_id in (own, named) for key, at in times.items()]
    names = {own: "host-18", named: "host-17"}
    batches = split(
        rows, source=Source("e", "id", 0, 0, 0), window=WindowSpan(0, 1), reason="scheduled", batch_size=9, names=names
    )
    topic.sink.take(0, [BatchRecord(0, encode_batch(batch)) for batch in batches])
    await asyncio.wait_for(is_applied.wait(), 10)
    topic.sink.lose([0])
    assert dead_letters.agents == [own, "host-17"] * 2
