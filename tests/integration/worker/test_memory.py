"""A worker's memory is bounded whatever the records are: a process is fed large ones, and its peak is read."""

import base64
import json
import os
import uuid
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from pipeline.core.batch import decode_batch
from pipeline.kafka.records import dead_letter_of
from tests.support.deployment import consume_all, eventually

pytestmark = pytest.mark.services

RECORDS, VALUE_BYTES = 100, 5_000_000
MAX_PEAK_MB = 500


def produce(settings, records):
    refused = []
    producer = Producer(
        {
            **settings.client_config(),
            "enable.idempotence": True,
            "message.max.bytes": 6_000_000,
            "queue.buffering.max.kbytes": 100_000,
            "on_delivery": lambda error, _: refused.append(error),
        }
    )
    for number, value in enumerate(records):
        while True:
            try:
                producer.produce(settings.events_topic, value, partition=number % settings.partitions)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0
    assert set(refused) == {None}


def produce_bombs(settings, count):
    """Produce record batches of a few kilobytes, each of one record of 300 MB."""
    producer = Producer(
        {
            **settings.client_config(),
            "compression.type": "zstd",
            "message.max.bytes": 1_000_000_000,
            "queue.buffering.max.kbytes": 1_000_000,
        }
    )
    for _ in range(count):
        producer.produce(settings.events_topic, bytes(300_000_000), partition=0)
        assert producer.flush(60) == 0


def committed(settings):
    consumer = Consumer({**settings.client_config(), "group.id": settings.worker_group})
    try:
        partitions = [TopicPartition(settings.events_topic, number) for number in range(settings.partitions)]
        return sum(max(position.offset, 0) for position in consumer.committed(partitions, timeout=10))
    finally:
        consumer.close()


def peak_mb(process):
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reports(text):
    for number in range(RECORDS):
        entry = {"key": "k", "value": text}
        yield json.dumps({"agent_id": str(uuid.UUID(int=number)), "entries": [entry]}).encode()


def garbage(text):
    for _ in range(RECORDS):
        yield text.encode()


@pytest.mark.parametrize("kind", [reports, garbage])
async def test_worker_fed_500_mb_of_large_records_stays_under_500_mb(deploy, kind):
    large = {"max.message.bytes": "6000000"}
    pipeline = await deploy(topic_configs={"events": large, "dead_letter": large}, partitions=8)
    settings = pipeline.settings
    produce(settings, kind(base64.b64encode(os.urandom(VALUE_BYTES * 3 // 4)).decode()))
    worker = await pipeline.started("worker")
    await eventually("all are used and committed", lambda: committed(settings) == RECORDS)
    peak = peak_mb(worker)
    assert pipeline.stop(worker) == 0
    assert peak < MAX_PEAK_MB


async def test_worker_fed_record_batches_that_unpack_to_300_mb_refuses_them(deploy):
    pipeline = await deploy()
    produce_bombs(pipeline.settings, 3)
    produce(pipeline.settings, [json.dumps({"agent_id": str(uuid.UUID(int=1)), "entries": [{"key": "k"}]}).encode()])
    worker = await pipeline.started("worker")
    await eventually("all are used and committed", lambda: committed(pipeline.settings) == 4)
    peak = peak_mb(worker)
    assert pipeline.stop(worker) == 0
    assert peak < MAX_PEAK_MB
    (batch,) = consume_all(pipeline.settings, pipeline.settings.batches_topic)
    assert decode_batch(batch.value()).agent_ids == [str(uuid.UUID(int=1))]
    letters = [dead_letter_of(letter) for letter in consume_all(pipeline.settings, pipeline.settings.dead_letter_topic)]
    assert [letter.source.rpartition("@")[2] for letter in letters] == ["0", "1", "2"]
    assert {"can't be unpacked within 67,108,864 bytes" in letter.reason for letter in letters} == {True}


async def test_open_windows_are_bounded_in_bytes(deploy):
    pipeline = await deploy(window_seconds=3600, open_windows_bytes=16 * 1024 * 1024)
    count = 200_000
    ids = (str(uuid.UUID(int=number)) for number in range(count))
    entries = [{"key": "k", "value": "x" * 2000}]
    produce(pipeline.settings, (json.dumps({"agent_id": agent_id, "entries": entries}).encode() for agent_id in ids))
    worker = await pipeline.started("worker")
    await eventually("all are used and committed", lambda: committed(pipeline.settings) == count)
    peak = peak_mb(worker)
    assert pipeline.stop(worker) == 0
    assert peak < 350  # of which 250 MB do not depend on the windows
