"""The sink, with a consumer and a store that the test provides."""

import asyncio
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry

from pipeline.core.batch import Batch, Source, WindowSpan, encode_batch
from pipeline.errors import ConfigError, FlushFailed, ProgressGap, ServiceUnavailable, TopicMismatch
from pipeline.monitoring.metrics import SinkMetrics
from pipeline.postgres.store import Applied
from pipeline.sink import Sink


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
