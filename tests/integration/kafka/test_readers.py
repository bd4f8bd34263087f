"""The readers of ranges, on a real Kafka: exactly the range, in any record batches; no waiting for lost records."""

import asyncio
import uuid
from contextlib import asynccontextmanager

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from pipeline.errors import ServiceUnavailable
from pipeline.kafka.chunk_reader import ChunkReader
from pipeline.kafka.range_reader import OffsetRange, RangeReader

pytestmark = pytest.mark.services

PLAINTEXT = {"security_protocol": "PLAINTEXT"}


@pytest.fixture
def topic(bootstrap_servers):
    name = f"ranges-{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    admin.create_topics([NewTopic(name, 2, 1)])[name].result(30)
    return name


@asynccontextmanager
async def reading(servers, topic):
    reader = ChunkReader(servers.split(","), PLAINTEXT, topic)
    await reader.start()
    try:
        yield reader
    finally:
        await reader.stop()


def produce(servers, topic, partition, numbers):
    """Produce the numbers to a partition, as one record batch."""
    producer = Producer({"bootstrap.servers": servers, "linger.ms": 500, "compression.type": "lz4"})
    for number in numbers:
        producer.produce(topic, str(number).encode(), partition=partition)
    assert producer.flush(30) == 0


async def read_all(reader):
    """Read the open range to its end; return its records' offsets, and the lists' lengths must be their sum."""
    offsets = []
    async with asyncio.timeout(30):
        while not reader.is_done:
            for records in await reader.read():
                assert [int(record.value) for record in records] == [record.offset for record in records]
                offsets += [record.offset for record in records]
                assert reader.position == offsets[-1] + 1
    return offsets


async def test_range_is_read_exactly_though_it_begins_and_ends_within_record_batches(bootstrap_servers, topic):
    for start in range(0, 5000, 1000):
        produce(bootstrap_servers, topic, 0, range(start, start + 1000))
    async with reading(bootstrap_servers, topic) as reader:
        for start, end in ((0, 5000), (1, 2), (999, 3001), (4999, 5000), (700, 700)):
            reader.open(OffsetRange(0, start, end))
            assert await read_all(reader) == list(range(start, end))


async def test_range_opened_before_the_one_before_was_read_is_read_alone(bootstrap_servers, topic):
    for partition in (0, 1):
        produce(bootstrap_servers, topic, partition, range(1000))
    async with reading(bootstrap_servers, topic) as reader:
        for partition, start in ((0, 0), (1, 500), (1, 0), (0, 10)):
            reader.open(OffsetRange(partition, start, 1000))
            while not (lists := await reader.read()) or not (records := next(lists, None)):
                pass
            assert records[0].offset == start
        assert reader.position < 1000


async def test_range_whose_records_retention_has_deleted_is_at_its_end(bootstrap_servers, topic):
    produce(bootstrap_servers, topic, 0, range(1000))
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    for partition_end in (600, 1000):
        (deleted,) = admin.delete_records([TopicPartition(topic, 0, partition_end)]).values()
        deleted.result(30)
        async with reading(bootstrap_servers, topic) as reader:
            reader.open(OffsetRange(0, 0, 900))
            assert await read_all(reader) == list(range(partition_end, 900))


async def test_range_that_ends_with_transaction_markers_is_at_its_end(bootstrap_servers, topic):
    producer = Producer({"bootstrap.servers": bootstrap_servers, "transactional.id": topic})
    producer.init_transactions(30)
    for number in (0, 2):  # 1 and 3 are the markers
        producer.begin_transaction()
        producer.produce(topic, str(number).encode(), partition=0)
        producer.commit_transaction(30)
    async with reading(bootstrap_servers, topic) as reader:
        reader.open(OffsetRange(0, 0, 4))
        assert await read_all(reader) == [0, 2]


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
async def test_record_batch_that_cannot_be_unpacked_is_passed_by(bootstrap_servers, topic, codec):
    config = {"compression.type": codec, "message.max.bytes": 1_000_000_000, "queue.buffering.max.kbytes": 1_000_000}
    producer = Producer({"bootstrap.servers": bootstrap_servers, **config})
    for value in (b"0", bytes(150_000_000), b"2"):
        producer.produce(topic, value, partition=0)
        assert producer.flush(60) == 0
    async with reading(bootstrap_servers, topic) as reader:
        reader.open(OffsetRange(0, 0, 3))
        read = []
        while not reader.is_done:
            read += [(record.offset, len(record.value) < 1000) for records in await reader.read() for record in records]
    assert read[0] == (0, True)
    assert read[1][0] == 1  # its records as they came: gzip holds more than a thousand bytes, zstd fewer
    assert read[2] == (2, True)
    async with RangeReader({"bootstrap.servers": bootstrap_servers}, topic) as range_reader:
        offsets = await asyncio.to_thread(
            lambda: [message.offset() for message in range_reader.records(OffsetRange(0, 0, 3))]
        )
    assert offsets == {"gzip": [0, 1, 2], "zstd": [0, 2]}[codec]  # librdkafka itself bounds zstd alone


async def test_kafka_that_does_not_answer_is_reported(unused_tcp_port):
    reader = ChunkReader([f"127.0.0.1:{unused_tcp_port}"], PLAINTEXT, "events")
    with pytest.raises(ServiceUnavailable, match="can't be read"):
        await reader.start()
