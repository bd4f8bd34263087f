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
        self.asked = asyncio.Event()
        self.may_begin = asyncio.Event()
        self.may_begin.set()

    async def send(self, topic, value, *, partition=-1, key=None, headers=()):
        self.sent.append((partition, decode_batch(value)))
        acknowledged = asyncio.get_running_loop().create_future()
        if partition in self.withholding:
            self.withheld[partition] = acknowledged
        else:
            acknowledged.set_result(None)
        return acknowledged


@pytest.fixture
async def running(deploy, request):
    """A worker under way: (pipeline, outlet, worker)."""
    pipeline = await deploy(window_seconds=0.1)
    outlet = Outlet()
    if request.node.get_closest_marker("held_up"):
        outlet.may_begin.clear()

    async def no_dead_letters(rejected, partition):
        raise AssertionError(rejected.reason)

    async def events_topic_id():
        outlet.asked.set()
        await outlet.may_begin.wait()
        return "events-id"

    worker = Worker(
        pipeline.settings,
        send=outlet.send,
        dead_letter=no_dead_letters,
        events_topic_id=events_topic_id,
        partitions=4,
        clock=SystemClock(),
        metrics=WorkerMetrics(CollectorRegistry()),
    )
    run = asyncio.create_task(worker.run())
    yield pipeline, outlet, worker
    for acknowledged in outlet.withheld.values():
        acknowledged.set_result(None)
    worker.stop()
    await run


def produce(pipeline, partition, **values):
    producer = Producer(pipeline.settings.client_config())
    producer.produce(pipeline.settings.events_topic, record(0, AGENT, **values).value, partition=partition)
    assert producer.flush(10) == 0


def committed(pipeline, partition):
    consumer = Consumer({**pipeline.settings.client_config(), "group.id": pipeline.settings.worker_group})
    try:
        (position,) = consumer.committed([TopicPartition(pipeline.settings.events_topic, partition)], timeout=10)
        return position.offset
    finally:
        consumer.close()


async def test_offsets_are_committed_once_kafka_has_acknowledged_the_batch(running):
    pipeline, outlet, _ = running
    outlet.withholding = {0}
    produce(pipeline, 0, k="v")
    await eventually("partition 0's batch is sent", lambda: outlet.withheld)
    produce(pipeline, 1, k="v")
    # Both partitions commit together: when 1's offset is there, 0's would be too, had it been committed too early.
    await eventually("partition 1's offset is committed", lambda: committed(pipeline, 1) == 1)
    assert committed(pipeline, 0) < 0
    outlet.withheld.pop(0).set_result(None)
    await eventually("partition 0's offset is committed", lambda: committed(pipeline, 0) == 1)


async def test_window_that_kafka_does_not_acknowledge_is_told_with_its_age_and_holds_the_worker_in_the_end(running):
    pipeline, outlet, worker = running
    outlet.withholding = {0}
    assert worker.unacknowledged_seconds() == 0
    assert not worker.is_held
    for number in range(MAX_WAITING + 1):
        produce(pipeline, 0, k=str(number))
        await eventually("it is folded", lambda n=number: worker.folded_records == n + 1)
        await eventually("its window is closed", lambda: worker.table.open_pairs()[0] == 0)
    assert worker.is_held
    await eventually("it gets older", lambda: worker.unacknowledged_seconds() > 1)
    outlet.withholding = set()
    outlet.withheld.pop(0).set_result(None)
    await eventually("nothing waits", lambda: worker.unacknowledged_seconds() == 0)
    assert not worker.is_held


async def test_positions_are_those_of_the_partitions_that_are_owned(running):
    pipeline, _, worker = running
    await eventually("all are owned", lambda: set(worker.positions()) == {0, 1, 2, 3})
    produce(pipeline, 1, k="v")
    await eventually("it is read", lambda: worker.positions()[1].next_offset == 1)
    assert abs(worker.positions()[1].not_before - time.time()) < 60
    assert worker.positions()[2] == Position(0, 0)
    worker.stop()
    await eventually("none is owned", lambda: worker.positions() == {})


async def test_backlog_is_written_as_soon_as_it_is_read(deploy):
    pipeline = await deploy(window_seconds=3600)
    produce(pipeline, 2, k="waited")
    await pipeline.started("sink")
    await pipeline.started("worker")
    await eventually("the row is there", pipeline.table)


async def test_records_read_twice_are_folded_once(running):
    pipeline, _, worker = running
    for number in range(3):
        produce(pipeline, 0, k=str(number))
    await eventually("they are folded", lambda: worker.folded_records == 3)
    await worker.app.consumer.seek(TP(pipeline.settings.events_topic, 0), 0)
    produce(pipeline, 0, k="3")
    await eventually("the new one is folded", lambda: worker.folded_records >= 4)
    assert worker.folded_records == 4


@pytest.fixture
def empty_folder(monkeypatch, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


async def test_records_that_a_rebalance_drops_before_anything_is_committed_are_read_again(running):
    pipeline, _, worker = running
    await eventually("all are owned", lambda: set(worker.positions()) == {0, 1, 2, 3})
    consumer, tp = worker.app.consumer, TP(pipeline.settings.events_topic, 0)
    await eventually("records flow", consumer.can_resume_flow.is_set)
    consumer.stop_flow()  # as Faust does at first
    produce(pipeline, 0, k="v")

    async def is_taken():
        await consumer._thread.getmany({tp}, 0.1)  # as Faust's own call that was under way, whose answer it drops
        return await consumer.position(tp) == 1

    await eventually("the record is taken", is_taken)
    assert worker.folded_records == 0
    await consumer.perform_seek()  # as Faust does in the end
    consumer.resume_flow()
    await eventually("it is read again", lambda: worker.folded_records == 1)


async def test_worker_writes_nothing_to_the_directory_it_runs_in(empty_folder, running):
    pipeline, outlet, _ = running
    produce(pipeline, 0, k="v")
    await eventually("the batch is sent", lambda: outlet.sent)
    assert list(empty_folder.iterdir()) == []


@pytest.mark.held_up
async def test_records_don_t_flow_before_the_partitions_are_taken_up(running):
    pipeline, outlet, worker = running
    for number in range(3):
        produce(pipeline, number, k="v")
    await outlet.asked.wait()
    await asyncio.sleep(1)  # long enough for a fetch to bring the records, were they let through
    outlet.may_begin.set()
    await eventually("all are folded", lambda: worker.folded_records == 3)
