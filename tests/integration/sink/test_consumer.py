"""The sink's consumer: what is asked of its thread, whatever becomes of the caller."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest
from confluent_kafka import Producer

from pipeline.errors import ServiceUnavailable, TopicMismatch
from pipeline.kafka.topics import create_topics, delete_topics, load_topic_specs
from pipeline.monitoring.lag import Position
from pipeline.sink import BatchConsumer
from tests.support.deployment import eventually


def ignore(*_):
    pass


@pytest.fixture
async def consumer():
    """A consumer whose broker is down."""

    async def locate(_partitions):
        return {}

    consumer = BatchConsumer(
        {"bootstrap.servers": "127.0.0.1:1"},
        topic="batches",
        group="sink",
        session_timeout_seconds=6,
        locate=locate,
    )
    yield consumer
    await consumer.close()


async def test_call_whose_caller_was_cancelled_leaves_the_consumer_running(consumer):
    cancelled = asyncio.create_task(consumer.seek(0, 5))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    running = consumer.start(ignore, ignore)
    assert await asyncio.wait_for(consumer.ends(), 10) == {}  # answered behind the cancelled call
    assert not running.done()


async def test_call_after_the_consumer_ended_is_refused(consumer):
    consumer.start(ignore, ignore)
    await consumer.close()
    with pytest.raises(ServiceUnavailable, match="has ended"):
        await asyncio.wait_for(consumer.ends(), 10)


class Reader:
    """Takes what a consumer delivers."""

    def __init__(self):
        self.offsets = []
        self.losses = 0

    async def locate(self, _partitions):
        return {0: len(self.offsets)}

    def take(self, _partition, messages):
        self.offsets += [message.offset() for message in messages]

    def lose(self, _partitions):
        self.losses += 1

    @asynccontextmanager
    async def consuming(self, settings, **options):
        consumer = BatchConsumer(
            settings.client_config(),
            topic=settings.batches_topic,
            group=settings.sink_group,
            session_timeout_seconds=6,
            locate=self.locate,
            **options,
        )
        self.consuming_task = consumer.start(self.take, self.lose)
        try:
            yield consumer
        finally:
            await consumer.close()


def produce(settings, *values):
    producer = Producer(settings.client_config())
    for value in values:
        producer.produce(settings.batches_topic, value, partition=0)
    assert producer.flush(10) == 0


@pytest.mark.services
async def test_partition_paused_before_a_rebalance_is_read_after_it(deploy):
    settings = (await deploy(partitions=1)).settings
    reader, other = Reader(), Reader()
    async with reader.consuming(settings, max_buffered_bytes=3000) as consumer:
        produce(settings, b"x" * 5000)
        await eventually("the buffer is full", lambda: consumer.is_held)
        async with other.consuming(settings):
            await eventually("there was a rebalance", lambda: reader.losses)
            consumer.release(5000)
        await eventually("the partition is back", lambda: consumer.is_assigned)
        produce(settings, b"y")
        await eventually("it is read on", lambda: 1 in reader.offsets, 20)


@pytest.mark.services
async def test_ends_leave_out_what_was_applied_before_the_start(deploy):
    settings = (await deploy(partitions=1)).settings
    produce(settings, b"x", b"y")
    reader = Reader()
    reader.offsets = [0, 1]  # applied by an earlier sink
    async with reader.consuming(settings) as consumer:
        await eventually("the partition is assigned", lambda: consumer.is_assigned)
        assert await consumer.ends() == {}
        produce(settings, b"z")
        assert await consumer.ends() == {0: 3}


@pytest.mark.services
async def test_positions_are_what_was_handed_over_and_go_with_the_partition(deploy):
    settings = (await deploy(partitions=1)).settings
    reader, other = Reader(), Reader()
    async with reader.consuming(settings) as consumer:
        await eventually("the partition is assigned", lambda: consumer.positions() == {0: Position(0, 0)})
        produce(settings, b"x", b"y")
        await eventually("both are read", lambda: len(reader.offsets) == 2)
        position = consumer.positions()[0]
        assert (position.next_offset, position.reached) == (2, 2)
        assert abs(position.not_before - time.time()) < 60
        async with other.consuming(settings) as second:
            await eventually("one owns it", lambda: len([*consumer.positions(), *second.positions()]) == 1)


@pytest.mark.services
async def test_position_passes_transaction_markers_which_are_no_records(deploy):
    settings = (await deploy(partitions=1)).settings
    reader = Reader()
    async with reader.consuming(settings) as consumer:
        await eventually("the partition is assigned", lambda: consumer.positions())
        producer = Producer({**settings.client_config(), "transactional.id": settings.batches_topic})
        producer.init_transactions(30)
        producer.begin_transaction()
        producer.produce(settings.batches_topic, b"x", partition=0)
        producer.commit_transaction(30)
        await eventually("it is past the marker", lambda: consumer.positions()[0].reached == 2)
    assert reader.offsets == [0]


@pytest.mark.services
async def test_recreated_topic_ends_the_consumer_before_it_delivers_any_of_it(deploy):
    settings = (await deploy(partitions=1)).settings
    produce(settings, b"x", b"y")
    reader = Reader()
    async with reader.consuming(settings):
        await eventually("both are read", lambda: reader.offsets == [0, 1])
        specs = {"batches": load_topic_specs(names=settings.topic_names, partitions=1)["batches"]}
        delete_topics(settings.client_config(), specs)
        create_topics(settings.client_config(), specs)
        produce(settings, b"new")
        with pytest.raises(TopicMismatch, match="was recreated"):
            await asyncio.wait_for(reader.consuming_task, 60)
    assert reader.offsets == [0, 1]


@pytest.mark.services
async def test_member_without_partitions_is_in_its_group_and_one_unknown_to_kafka_is_not(deploy):
    settings = (await deploy(partitions=1)).settings
    readers = [Reader(), Reader()]
    async with readers[0].consuming(settings) as one, readers[1].consuming(settings) as other:
        assert one.seconds_out_of_group() > 0
        await eventually("both are in", lambda: one.seconds_out_of_group() == other.seconds_out_of_group() == 0)
    nowhere = settings.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:1"})
    async with Reader().consuming(nowhere) as alone:
        await eventually("it is out for a second", lambda: alone.seconds_out_of_group() > 1)
