"""The sink's consumer: what is asked of its thread, whatever becomes of who asked."""

import asyncio

import pytest

from pipeline.batch_consumer import BatchConsumer
from pipeline.errors import ServiceUnavailable


@pytest.fixture
async def consumer():
    """A consumer whose broker is away."""

    async def positions(_partitions):
        return {}

    consumer = BatchConsumer(
        {"bootstrap.servers": "127.0.0.1:1"},
        topic="batches",
        group="sink",
        session_timeout_seconds=6,
        positions=positions,
        on_records=lambda _partition, _messages: None,
        on_lost=lambda _partitions: None,
    )
    yield consumer
    await consumer.close()


async def test_call_whose_caller_was_cancelled_leaves_the_consumer_running(consumer):
    cancelled = asyncio.create_task(consumer.seek(0, 5))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    running = consumer.start()
    assert await asyncio.wait_for(consumer.ends(), 10) == {}  # answered behind the cancelled call
    assert not running.done()


async def test_call_after_the_consumer_ended_is_refused(consumer):
    consumer.start()
    await consumer.close()
    with pytest.raises(ServiceUnavailable, match="has ended"):
        await asyncio.wait_for(consumer.ends(), 10)
