"""The worker in this process, on a real Kafka, with an outlet that the test controls."""

import asyncio
import time
import uuid

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from faust.types import TP
from prometheus_client import CollectorRegistry

from pipeline.clock import SystemClock
from pipeline.core.batch import decode_batch
from pipeline.monitoring.lag import Position
from pipeline.monitoring.metrics import WorkerMetrics
from pipeline.testing import record
from pipeline.worker import Worker
from pipeline.worker.partition import MAX_WAITING
from tests.support.deployment import eventually

pytestmark = pytest.mark.services

AGENT = uuid.UUID(int=1)


class Outlet:
    """Takes batches; acknowledges those of all partitions but the withheld ones."""

    def __init__(self):
        self.sent = []
        self.withheld = {}
        self.withholding = set()
        self.is_asked = asyncio.Event()
        self.may_begin = asyncio.Event()
        self.may_begin.set()

    async def topic_id(self):
        self.is_asked.set()
        await self.may_begin.wait()
        return "events-id"

    async def send(self, topic, value, *, partition=-1, key=None, headers=()):
        self.sent.append((partition, decode_batch(value)))
        acknowledged = asyncio.get_running_loop().create_future()
        if partition in self.withholding:
            self.withheld[partition] = acknowledged
        else:
            acknowledged.set_result(None)
        return acknowledged


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def folded_records(registry):
    """How many records the worker has folded."""
    return lambda: registry.get_sample_value("agent_metadata_records_total")


@pytest.fixture
async def running(deploy, request, registry):
    """A running worker: (deployment, outlet, worker)."""
    deployment = await deploy(window_seconds=0.1)
    outlet = Outlet()
    if request.node.get_closest_marker("held_up"):
        outlet.may_begin.clear()

    worker = Worker(
        deployment.settings,
        publisher=outlet,
        dead_letters=None,  # nothing here is bad
        incarnation=outlet,
        partitions=4,
        clock=SystemClock(),
        metrics=WorkerMetrics(registry),
    )
    run = asyncio.create_task(worker.run())
    yield deployment, outlet, worker
    for acknowledged in outlet.withheld.values():
        acknowledged.set_result(None)
    worker.stop()
    await run


def produce(deployment, partition, **values):
    producer = Producer(deployment.settings.client_config())
    producer.produce(deployment.settings.events_topic, record(0, AGENT, **values).value, partition=partition)
    assert producer.flush(10) == 0


def committed(deployment, partition):
    consumer = Consumer({**deployment.settings.client_config(), "group.id": deployment.settings.worker_group})
    try:
        (position,) = consumer.committed([TopicPartition(deployment.settings.events_topic, partition)], timeout=10)
        return position.offset
    finally:
        consumer.close()


async def test_offsets_are_committed_once_kafka_has_acknowledged_the_batch(running):
    deployment, outlet, _ = running
    outlet.withholding = {0}
    produce(deployment, 0, k="v")
    await eventually("partition 0's batch is sent", lambda: outlet.withheld)
    produce(deployment, 1, k="v")
    # Both partitions commit together: when 1's offset is there, 0's would be too, had it been committed too early.
    await eventually("partition 1's offset is committed", lambda: committed(deployment, 1) == 1)
    assert committed(deployment, 0) < 0
    outlet.withheld.pop(0).set_result(None)
    await eventually("partition 0's offset is committed", lambda: committed(deployment, 0) == 1)


async def test_unacknowledged_window_shows_its_age_and_holds_the_worker_in_the_end(running, folded_records):
    deployment, outlet, worker = running
    outlet.withholding = {0}
    assert worker.unacknowledged_seconds() == 0
    assert not worker.is_held
    for number in range(MAX_WAITING + 1):
        produce(deployment, 0, k=str(number))
        await eventually("it is folded", lambda n=number: folded_records() == n + 1)
        await eventually("its window is closed", lambda: worker.table.open_pairs()[0] == 0)
    assert worker.is_held
    await eventually("it gets older", lambda: worker.unacknowledged_seconds() > 1)
    outlet.withholding = set()
    outlet.withheld.pop(0).set_result(None)
    await eventually("nothing waits", lambda: worker.unacknowledged_seconds() == 0)
    assert not worker.is_held


async def test_positions_are_those_of_the_partitions_that_are_owned(running):
    deployment, _, worker = running
    await eventually("all are owned", lambda: set(worker.positions()) == {0, 1, 2, 3})
    produce(deployment, 1, k="v")
    await eventually("it is read", lambda: worker.positions()[1].next_offset == 1)
    assert abs(worker.positions()[1].not_before - time.time()) < 60
    assert worker.positions()[2] == Position(0, 0)
    worker.stop()
    await eventually("none is owned", lambda: worker.positions() == {})


async def test_backlog_is_written_as_soon_as_it_is_read(deploy):
    deployment = await deploy(window_seconds=3600)
    produce(deployment, 2, k="waited")
    await deployment.started("sink")
    await deployment.started("worker")
    await eventually("the row is there", deployment.table)


async def test_records_read_twice_are_folded_once(running, folded_records):
    deployment, _, worker = running
    for number in range(3):
        produce(deployment, 0, k=str(number))
    await eventually("they are folded", lambda: folded_records() == 3)
    await worker.app.consumer.seek(TP(deployment.settings.events_topic, 0), 0)
    produce(deployment, 0, k="3")
    await eventually("the new one is folded", lambda: folded_records() >= 4)
    assert folded_records() == 4


@pytest.fixture
def empty_folder(monkeypatch, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


async def test_records_dropped_by_a_rebalance_before_the_first_commit_are_read_again(running, folded_records):
    deployment, _, worker = running
    await eventually("all are owned", lambda: set(worker.positions()) == {0, 1, 2, 3})
    consumer, tp = worker.app.consumer, TP(deployment.settings.events_topic, 0)
    await eventually("records flow", consumer.can_resume_flow.is_set)
    consumer.stop_flow()  # as Faust does at first
    produce(deployment, 0, k="v")

    async def is_taken():
        await consumer._thread.getmany({tp}, 0.1)  # as Faust's own call that was under way, whose answer it drops
        return await consumer.position(tp) == 1

    await eventually("the record is taken", is_taken)
    assert folded_records() == 0
    await consumer.perform_seek()  # as Faust does in the end
    consumer.resume_flow()
    await eventually("it is read again", lambda: folded_records() == 1)


async def test_worker_writes_nothing_to_the_directory_it_runs_in(empty_folder, running):
    deployment, outlet, _ = running
    produce(deployment, 0, k="v")
    await eventually("the batch is sent", lambda: outlet.sent)
    assert list(empty_folder.iterdir()) == []


@pytest.mark.held_up
async def test_records_don_t_flow_before_the_worker_starts_on_its_partitions(running, folded_records):
    deployment, outlet, _ = running
    for number in range(3):
        produce(deployment, number, k="v")
    await outlet.is_asked.wait()
    await asyncio.sleep(1)  # long enough for a fetch to bring the records, were they let through
    outlet.may_begin.set()
    await eventually("all are folded", lambda: folded_records() == 3)
