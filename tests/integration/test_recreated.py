"""Topics recreated under processes that run on, with more records than were read of the old ones."""

import signal
import uuid
from datetime import UTC, datetime

import pytest
from confluent_kafka import Consumer, TopicPartition

from tests.support.deployment import DEADLINE_SECONDS, consume_all, eventually
from tests.support.topics import recreate_topics

pytestmark = pytest.mark.services


def report(deployment, count, expected):
    """Report each of `count` new agents once; note what the table must hold."""
    now = datetime.now(UTC)
    with deployment.producer() as producer:
        for agent_id in (uuid.uuid4() for _ in range(count)):
            assert producer.add(agent_id, ["cpu"], ["1%"], [""], now)
            expected[str(agent_id), "cpu"] = ("1%", "", now)
        assert producer.flush(DEADLINE_SECONDS) == 0


async def recreate(deployment, role):
    settings = deployment.settings
    await recreate_topics(settings.client_config(), {role: settings.declared_topics()[role]})


def count_batches(deployment):
    return len(consume_all(deployment.settings, deployment.settings.batches_topic))


async def ends_by_itself(deployment, process):
    await eventually("it ends by itself", lambda: process.poll() is not None)
    assert process.returncode == 1
    (line,) = [line for line in deployment.log(process).splitlines() if line.startswith("agent-metadata: ")]
    assert line.endswith(f"was recreated while this {process.role} read it: start it again")


async def test_worker_reads_the_new_events_topic_from_its_beginning(deploy):
    deployment = await deploy(partitions=1, session_timeout_seconds=60, window_seconds=0.1)
    await deployment.started("sink")
    worker = await deployment.started("worker")
    expected = {}
    report(deployment, 5, expected)
    await deployment.wait_for(expected)
    worker.send_signal(signal.SIGSTOP)  # so that it does not see the deletion
    await recreate(deployment, "events")
    report(deployment, 50, expected)
    worker.send_signal(signal.SIGCONT)
    await ends_by_itself(deployment, worker)
    await deployment.started("worker")
    await deployment.wait_for(expected)


async def test_sink_applies_the_new_batches_topic_from_its_beginning(deploy):
    deployment = await deploy(partitions=1, session_timeout_seconds=60, window_seconds=0.1, batch_size=2)
    sink = await deployment.started("sink")
    await deployment.started("worker")
    expected = {}
    report(deployment, 5, expected)
    await deployment.wait_for(expected)
    before = count_batches(deployment)
    sink.send_signal(signal.SIGSTOP)
    await recreate(deployment, "batches")
    report(deployment, 4 * before, expected)
    await eventually("it holds more than before", lambda: count_batches(deployment) > before)
    sink.send_signal(signal.SIGCONT)
    await ends_by_itself(deployment, sink)
    await deployment.started("sink")
    await deployment.wait_for(expected)


@pytest.mark.parametrize(("note", "ignored"), [("topic_id:another", True), ("", False)])
async def test_committed_offset_of_another_topic_of_that_name_is_ignored(deploy, note, ignored):
    deployment = await deploy(partitions=1)
    settings = deployment.settings
    expected = {}
    report(deployment, 3, expected if ignored else {})
    report(deployment, 2, expected)
    consumer = Consumer({**settings.client_config(), "group.id": settings.worker_group})
    consumer.commit(offsets=[TopicPartition(settings.events_topic, 0, 3, note)], asynchronous=False)
    consumer.close()
    await deployment.started("sink")
    worker = await deployment.started("worker")
    await deployment.wait_for(expected)
    assert len(deployment.logged(worker, "offset_of_a_deleted_topic_ignored")) == ignored
