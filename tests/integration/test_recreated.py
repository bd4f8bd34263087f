"""Topics deleted and made anew under processes that go on, with more records than were read of the old ones."""

import asyncio
import signal
import uuid
from datetime import UTC, datetime

import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline.kafka.topics import create_topics, delete_topics
from tests.support.deployment import DEADLINE_SECONDS, consume_all, eventually

pytestmark = pytest.mark.services


def report(pipeline, count, expected):
    """Report once of each of so many new agents; note what the table must hold."""
    now = datetime.now(UTC)
    with pipeline.producer() as producer:
        for agent_id in (uuid.uuid4() for _ in range(count)):
            assert producer.add(agent_id, ["cpu"], ["1%"], [""], now)
            expected[str(agent_id), "cpu"] = ("1%", "", now)
        assert producer.flush(DEADLINE_SECONDS) == 0


async def make_anew(pipeline, role):
    spec = pipeline.settings.declared_topics()[role]
    await asyncio.to_thread(delete_topics, pipeline.settings.client_config(), {role: spec})
    # Until the deletion is through, Kafka may still have the old one.
    create = [create_topics, pipeline.settings.client_config(), {role: spec}]
    await eventually(f"{role} is made anew", lambda: asyncio.to_thread(*create))


def batches_held(pipeline):
    return len(consume_all(pipeline.settings, pipeline.settings.batches_topic))


async def ends_by_itself(pipeline, process):
    await eventually("it ends by itself", lambda: process.poll() is not None)
    assert process.returncode == 1
    (line,) = [line for line in pipeline.log(process).splitlines() if line.startswith("agent-metadata: ")]
    assert line.endswith(f"was made anew under this {process.role}: start it again")


async def test_worker_reads_the_new_events_topic_from_its_beginning(deploy):
    pipeline = await deploy(partitions=1, session_timeout_seconds=60, window_seconds=0.1)
    await pipeline.started("sink")
    worker = await pipeline.started("worker")
    expected = {}
    report(pipeline, 5, expected)
    await pipeline.wait_for(expected)
    worker.send_signal(signal.SIGSTOP)  # so that it sees nothing of it
    await make_anew(pipeline, "events")
    report(pipeline, 50, expected)
    worker.send_signal(signal.SIGCONT)
    await ends_by_itself(pipeline, worker)
    await pipeline.started("worker")
    await pipeline.wait_for(expected)


async def test_sink_applies_the_new_batches_topic_from_its_beginning(deploy):
    pipeline = await deploy(partitions=1, session_timeout_seconds=60, window_seconds=0.1, batch_size=2)
    sink = await pipeline.started("sink")
    await pipeline.started("worker")
    expected = {}
    report(pipeline, 5, expected)
    await pipeline.wait_for(expected)
    before = batches_held(pipeline)
    sink.send_signal(signal.SIGSTOP)
    await make_anew(pipeline, "batches")
    report(pipeline, 4 * before, expected)
    await eventually("it holds more than before", lambda: batches_held(pipeline) > before)
    sink.send_signal(signal.SIGCONT)
    await ends_by_itself(pipeline, sink)
    await pipeline.started("sink")
    await pipeline.wait_for(expected)


@pytest.mark.parametrize(("note", "ignored"), [("topic_id:another", True), ("", False)])
async def test_committed_offset_of_another_topic_of_that_name_is_ignored(deploy, note, ignored):
    pipeline = await deploy(partitions=1)
    settings = pipeline.settings
    expected = {}
    report(pipeline, 3, expected if ignored else {})
    report(pipeline, 2, expected)
    consumer = Consumer({**settings.client_config(), "group.id": settings.worker_group})
    consumer.commit(offsets=[TopicPartition(settings.events_topic, 0, 3, note)], asynchronous=False)
    consumer.close()
    await pipeline.started("sink")
    worker = await pipeline.started("worker")
    await pipeline.wait_for(expected)
    assert len(pipeline.logged(worker, "offset_of_a_deleted_topic_ignored")) == ignored
