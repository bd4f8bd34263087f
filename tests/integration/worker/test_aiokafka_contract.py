"""Holds aiokafka to the private parts that chunks.py and transport.py read: it fails if an upgrade moves one."""

import asyncio
import gc
import struct
import time
import uuid
import weakref
from collections import OrderedDict
from contextlib import asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.consumer.fetcher import READ_UNCOMMITTED, Fetcher, FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from faust.types import TP

from pipeline.kafka.chunks import RECORDS_PER_SLICE, TARGET_RECORDS, PartitionChunks, fetch_in_chunks
from pipeline.worker.table import LatestTables
from pipeline.worker.transport import ChunkApp, ChunkSchema
from tests.support.deployment import eventually

EVENTS = TP("events", 0)
T0_MS = 1_704_067_200_000
CODECS = ["none", "gzip", "snappy", "lz4", "zstd"]
CRC_BYTE = 17  # the first one of a record batch's CRC


def content(number):
    """What record `number` of a partition holds, whoever wrote it; some lack a key, a value or headers."""
    key = None if number % 7 == 3 else f"agent-{number % 5}".encode()
    value = None if number % 11 == 5 else f'{{"n": {number}}}'.encode() * (1 + number % 3)
    headers = [("n", str(number).encode()), ("empty", b"")] if number % 2 else []
    return key, value, T0_MS + number, headers


def record_batch(base_offset, count, *, codec="lz4", control=False, producer=None):
    """Encode a record batch as a broker stores it; with a producer's id, of that producer's transaction."""
    code = getattr(DefaultRecordBatch, f"CODEC_{codec.upper()}")
    is_transactional, producer_id = producer is not None, -1 if producer is None else producer
    builder = DefaultRecordBatchBuilder(2, code, is_transactional, producer_id, 0, 0, 64 * 1024 * 1024)
    for number in range(count):
        key, value, timestamp, headers = content(base_offset + number)
        assert builder.append(number, timestamp, key, value, headers) is not None
    encoded = bytearray(builder.build())
    encoded[:8] = base_offset.to_bytes(8, "big")  # what the broker does; the CRC leaves it out
    if control:
        encoded[22] |= 0x20  # in the attributes, which the CRC covers: such a batch is read unchecked
    return bytes(encoded)


def marker(offset, producer, *, commit):
    """Encode the control batch that ends a producer's transaction."""
    builder = DefaultRecordBatchBuilder(2, 0, 1, producer, 0, 0, 1024)
    assert builder.append(0, T0_MS, struct.pack(">hh", 0, commit), struct.pack(">hi", 0, 0), []) is not None
    encoded = bytearray(builder.build())
    encoded[:8] = offset.to_bytes(8, "big")
    encoded[22] |= 0x20
    return bytes(encoded)


def fetched(*encoded, at=0, check_crcs=True, aborted=None):
    """Return aiokafka's records of a fetch response that was asked for from offset `at` on."""
    return PartitionRecords(
        tp=EVENTS,
        records=MemoryRecords(b"".join(encoded)),
        aborted_transactions=aborted,
        fetch_offset=at,
        key_deserializer=None,
        value_deserializer=None,
        check_crcs=check_crcs,
        isolation_level=1,
    )


def chunked(*encoded, **options):
    return list(PartitionChunks(fetched(*encoded, **options)))


def refuse_nothing(record, reason):
    raise AssertionError(reason)


def seen(chunks):
    return [
        (record.offset, (record.key, record.value, record.timestamp, list(record.headers)))
        for chunk in chunks
        for records in chunk.slices(refuse_nothing)
        for record in records
    ]


def expected(*offsets):
    return [(offset, content(offset)) for offset in offsets]


def borders(chunks):
    return [(chunk.start, chunk.next_offset) for chunk in chunks]


# What aiokafka's records, batches and fetch results are, and what chunks.py makes of them.


def test_partition_records_have_the_attributes_that_chunks_read():
    records = fetched(record_batch(5, 3), at=6)
    names = {"_records", "_records_iterator", "_tp", "_check_crcs", "_aborted_transactions", "next_fetch_offset"}
    assert names <= set(vars(records))
    aborted = fetched(record_batch(5, 3), aborted=[(8, 7), (9, 5)])._aborted_transactions
    assert aborted == [(9, 5), (8, 7)]  # (producer id, first offset), by offset
    assert (records._tp, records._check_crcs, records.next_fetch_offset) == (EVENTS, True, 6)
    assert callable(records._records.has_next)
    assert callable(records._records.next_batch)


def test_response_is_out_of_memory_with_its_last_reader_without_a_search_for_cycles():
    records = fetched(record_batch(0, 1))
    alive = weakref.ref(records)
    gc.disable()
    try:
        chunks = PartitionChunks(records)
        del records
        assert alive() is None
        assert borders(chunks) == [(0, 1)]
    finally:
        gc.enable()


def test_record_batch_has_the_attributes_that_chunks_read():
    batch = fetched(record_batch(5, 3))._records.next_batch()
    assert batch.validate_crc() is True
    assert (batch.is_control_batch, batch.next_offset) == (False, 8)
    record = next(iter(batch))
    assert (record.offset, record.key, record.value, record.timestamp) == (5, *content(5)[:3])
    assert list(record.headers) == content(5)[3]
    assert record.timestamp_type == 0  # CreateTime


def test_fetch_result_hands_out_chunks_and_moves_the_position_past_each():
    positions = []
    state = SimpleNamespace(paused=False, position=0)

    def consumed_to(offset):
        state.position = offset
        positions.append(offset)

    state.consumed_to = consumed_to
    assignment = SimpleNamespace(active=True, state_value=lambda tp: state)
    encoded = [record_batch(start, TARGET_RECORDS) for start in (0, TARGET_RECORDS)]
    result = FetchResult(EVENTS, assignment=assignment, partition_records=fetched(*encoded), backoff=0)
    assert isinstance(result._partition_records, PartitionRecords)
    result._partition_records = PartitionChunks(result._partition_records)
    chunks = [*result.getall(1), *result.getall(1)]
    assert borders(chunks) == [(0, TARGET_RECORDS), (TARGET_RECORDS, 2 * TARGET_RECORDS)]
    assert positions == [TARGET_RECORDS, 2 * TARGET_RECORDS]
    assert result.getall(1) == []
    assert not result.has_more()


@pytest.mark.parametrize("codec", CODECS)
def test_slices_of_any_codec_hold_every_record_once_in_order(codec):
    chunks = chunked(record_batch(0, 1234, codec=codec), record_batch(1234, 7, codec=codec))
    assert seen(chunks) == expected(*range(1241))
    assert borders(chunks) == [(0, 1241)]


@pytest.mark.parametrize("codec", ["none", "lz4"])
@pytest.mark.parametrize(
    ("count", "lengths"),
    [
        (1, [1]),
        (RECORDS_PER_SLICE - 1, [RECORDS_PER_SLICE - 1]),
        (RECORDS_PER_SLICE, [RECORDS_PER_SLICE]),
        (RECORDS_PER_SLICE + 1, [RECORDS_PER_SLICE, 1]),
        (2 * RECORDS_PER_SLICE, [RECORDS_PER_SLICE] * 2),
    ],
)
def test_slices_are_at_most_500_records_of_one_batch(codec, count, lengths):
    (chunk,) = chunked(record_batch(0, count, codec=codec), record_batch(count, 2, codec=codec))
    assert [len(records) for records in chunk.slices(refuse_nothing)] == [*lengths, 2]


def test_chunks_end_at_the_first_batch_border_past_their_target():
    size = TARGET_RECORDS * 2 // 3
    chunks = chunked(*(record_batch(start, size) for start in range(0, 5 * size, size)))
    assert borders(chunks) == [(0, 2 * size), (2 * size, 4 * size), (4 * size, 5 * size)]
    assert seen(chunks) == expected(*range(5 * size))


@pytest.mark.parametrize("start", [1, RECORDS_PER_SLICE, RECORDS_PER_SLICE + 1, 1199])
def test_chunk_of_a_fetch_from_within_a_batch_begins_at_that_offset(start):
    (chunk,) = chunked(record_batch(0, 1200), record_batch(1200, 3), at=start)
    assert (chunk.start, chunk.next_offset) == (start, 1203)
    assert seen([chunk]) == expected(*range(start, 1203))


def test_chunk_over_offsets_that_compaction_removed_covers_them():
    (chunk,) = chunked(record_batch(10, 2), record_batch(40, 2), at=5)
    assert (chunk.start, chunk.next_offset) == (5, 42)
    assert seen([chunk]) == expected(10, 11, 40, 41)


def test_control_batch_moves_the_offset_without_a_record():
    (chunk,) = chunked(record_batch(0, 2), record_batch(2, 1, control=True), record_batch(3, 1), check_crcs=False)
    assert (chunk.start, chunk.next_offset) == (0, 4)
    assert seen([chunk]) == expected(0, 1, 3)


def test_control_batch_alone_makes_a_chunk_without_records():
    (chunk,) = chunked(record_batch(2, 1, control=True), at=2, check_crcs=False)
    assert (chunk.start, chunk.next_offset, seen([chunk])) == (2, 3, [])


def test_response_cut_within_a_batch_ends_before_it():
    whole, cut = record_batch(0, 3), record_batch(3, 3)[:-1]
    assert borders(chunked(whole, cut)) == [(0, 3)]


def test_batch_with_a_broken_crc_is_refused():
    broken = bytearray(record_batch(3, 3))
    broken[CRC_BYTE] ^= 1
    with pytest.raises(CorruptRecordException, match=r"events.*CRC"):
        chunked(record_batch(0, 3), bytes(broken))


def test_batch_with_a_broken_crc_is_taken_where_checks_are_off():
    broken = bytearray(record_batch(0, 3))
    broken[CRC_BYTE] ^= 1
    assert seen(chunked(bytes(broken), check_crcs=False)) == expected(0, 1, 2)


def test_records_of_an_aborted_transaction_are_left_out():
    """Producer 1 aborts 0-2, whose marker is 7, and commits 8-9; producer 2 commits 3-4; 5-6 are of no transaction."""
    chunks = chunked(
        record_batch(0, 3, producer=1),
        record_batch(3, 2, producer=2),
        record_batch(5, 2),
        marker(7, 1, commit=False),
        record_batch(8, 2, producer=1),
        marker(10, 1, commit=True),
        marker(11, 2, commit=True),
        aborted=[(1, 0)],
        check_crcs=False,
    )
    assert seen(chunks) == expected(3, 4, 5, 6, 8, 9)
    assert borders(chunks) == [(0, 12)]


@pytest.mark.parametrize("at", [1, 3])
def test_response_from_within_an_aborted_transaction_leaves_out_its_rest(at):
    encoded = [record_batch(0, 3, producer=1), marker(3, 1, commit=False), record_batch(4, 1, producer=1)]
    (chunk,) = chunked(*encoded[at // 3 :], at=at, aborted=[(1, 0)], check_crcs=False)
    assert (seen([chunk]), chunk.next_offset) == (expected(4), 5)


def test_producer_that_aborts_twice_in_a_response_is_left_out_twice():
    chunks = chunked(
        record_batch(0, 1, producer=1),
        marker(1, 1, commit=False),
        record_batch(2, 1, producer=1),
        marker(3, 1, commit=True),
        record_batch(4, 1, producer=1),
        marker(5, 1, commit=False),
        aborted=[(1, 4), (1, 0)],
        check_crcs=False,
    )
    assert seen(chunks) == expected(2)


@pytest.mark.parametrize("codec", ["gzip", "lz4", "zstd"])
def test_record_batch_that_unpacks_to_too_much_is_refused_whole_and_alone(codec):
    builder = DefaultRecordBatchBuilder(2, getattr(DefaultRecordBatch, f"CODEC_{codec.upper()}"), 0, -1, -1, -1, 2**30)
    for number in range(5):
        assert builder.append(number, T0_MS, None, bytes(20_000_000), []) is not None
    bomb = bytearray(builder.build())
    bomb[:8] = (2).to_bytes(8, "big")
    (chunk,) = chunked(record_batch(0, 2), bytes(bomb), record_batch(7, 1))
    assert len(bomb) < 1_000_000
    fetch_in_chunks(SimpleNamespace(_fetcher=SimpleNamespace()))
    refused = []
    slices = list(chunk.slices(lambda record, reason: refused.append((record, reason))))
    assert [[record.offset for record in records] for records in slices] == [[0, 1], [], [7]]
    ((record, reason),) = refused
    assert (record.offset, record.timestamp, record.key) == (2, T0_MS, None)
    assert record.value == bytes(bomb[-len(record.value) :])  # the batch's records as they came
    assert reason.startswith("a record batch with the offsets 2 to 6 can't be unpacked within 67,108,864 bytes")


# The whole path: a real broker, Faust's consumer thread, aiokafka's fetcher.


def create_topic(servers, *, timestamp_type="CreateTime"):
    topic = f"chunks-{uuid.uuid4()}"
    admin = AdminClient({"bootstrap.servers": servers})  # named, because it must outlive the wait
    config = {"message.timestamp.type": timestamp_type, "retention.ms": "-1"}  # the records' times are long past
    admin.create_topics([NewTopic(topic, 1, config=config)])[topic].result(30)
    return topic


def send(producer, topic, numbers):
    for number in numbers:
        key, value, timestamp, headers = content(number)
        producer.produce(topic, value, key, 0, timestamp=timestamp, headers=headers)


@asynccontextmanager
async def consuming(servers, topic):
    """Run a ChunkApp, yielding it and a function that returns the chunks up to an offset, once they are there."""
    app = ChunkApp(
        f"test-{topic}",
        broker=f"kafka://{servers}",
        TableManager=LatestTables,
        store="memory://",
        autodiscover=False,
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        worker_redirect_stdouts=False,
    )
    chunks = []
    arrived = asyncio.Condition()

    async def collect(stream):
        async for event in stream.events():
            assert event.message.offset == event.value.start
            async with arrived:
                chunks.append(event.value)
                arrived.notify_all()

    async def up_to(next_offset):
        async with asyncio.timeout(60), arrived:
            await arrived.wait_for(lambda: chunks and chunks[-1].next_offset >= next_offset)
        return chunks

    app.agent(app.topic(topic, schema=ChunkSchema(), acks=False), name="collect")(collect)
    await app.start()
    try:
        yield app, up_to
    finally:
        await app.stop()


@pytest.mark.services
async def test_consumer_of_aiokafka_keeps_fetched_records_where_chunks_look(bootstrap_servers):
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap_servers, group_id="chunks-contract")
    await consumer.start()
    try:
        assert isinstance(consumer._fetcher, Fetcher)
        assert type(consumer._fetcher._records) is OrderedDict
        assert consumer._fetcher._isolation_level == READ_UNCOMMITTED
        assert consumer._coordinator.check_errors() is None
    finally:
        await consumer.stop()


@pytest.mark.services
@pytest.mark.parametrize("codec", CODECS)
async def test_consumed_chunks_of_any_codec_hold_every_record_once_in_order(bootstrap_servers, codec):
    topic, count = create_topic(bootstrap_servers), 2 * TARGET_RECORDS + RECORDS_PER_SLICE
    producer = Producer({"bootstrap.servers": bootstrap_servers, "compression.type": codec, "linger.ms": 50})
    send(producer, topic, range(count))
    assert producer.flush(30) == 0
    async with consuming(bootstrap_servers, topic) as (_, up_to):
        chunks = await up_to(count)
    assert seen(chunks) == expected(*range(count))
    assert chunks[0].start == 0
    assert all(earlier.next_offset == later.start for earlier, later in pairwise(chunks))


@pytest.mark.services
async def test_consumer_seeking_into_a_batch_gets_what_follows_only(bootstrap_servers):
    topic, count, start = create_topic(bootstrap_servers), 1000, 321
    producer = Producer({"bootstrap.servers": bootstrap_servers, "compression.type": "lz4", "linger.ms": 500})
    send(producer, topic, range(count))
    assert producer.flush(30) == 0
    async with consuming(bootstrap_servers, topic) as (app, up_to):
        chunks = await up_to(count)
        chunks.clear()
        await app.consumer.seek(TP(topic, 0), start)
        await up_to(count)
    assert chunks[0].start == start
    assert seen(chunks) == expected(*range(start, count))


@pytest.mark.services
async def test_consumer_seeking_back_before_the_chunk_it_just_got_reads_again(bootstrap_servers):
    topic = create_topic(bootstrap_servers)
    producer = Producer({"bootstrap.servers": bootstrap_servers})
    async with consuming(bootstrap_servers, topic) as (app, up_to):
        for end in (10, 20, 30):  # a chunk each: the last begins beyond where we go back to
            send(producer, topic, range(end - 10, end))
            assert producer.flush(30) == 0
            chunks = await up_to(end)
        for _ in range(3):
            chunks.clear()
            await app.consumer.seek(TP(topic, 0), 5)
            await up_to(30)
            assert seen(chunks) == expected(*range(5, 30))


@pytest.mark.services
async def test_consumed_commit_markers_move_the_offset_without_records(bootstrap_servers):
    topic = create_topic(bootstrap_servers)
    producer = Producer({"bootstrap.servers": bootstrap_servers, "transactional.id": topic})
    producer.init_transactions(30)
    for numbers in (range(3), range(4, 6)):  # 3 and 6 are the markers
        producer.begin_transaction()
        send(producer, topic, numbers)
        producer.commit_transaction(30)
    async with consuming(bootstrap_servers, topic) as (_, up_to):
        chunks = await up_to(7)
    assert seen(chunks) == expected(0, 1, 2, 4, 5)
    assert chunks[-1].next_offset == 7


@pytest.mark.services
async def test_consumed_chunks_leave_out_what_is_aborted_and_end_before_what_is_open(bootstrap_servers):
    topic = create_topic(bootstrap_servers)
    plain = Producer({"bootstrap.servers": bootstrap_servers})
    open_one = Producer({"bootstrap.servers": bootstrap_servers, "transactional.id": f"{topic}-open"})
    other = Producer({"bootstrap.servers": bootstrap_servers, "transactional.id": topic})
    for producer in (open_one, other):
        producer.init_transactions(30)

    def send_at_once(producer, numbers):
        send(producer, topic, numbers)
        assert producer.flush(30) == 0

    other.begin_transaction()
    send_at_once(other, [0, 1])
    send_at_once(plain, [2])
    other.abort_transaction(30)  # its marker is 3
    other.begin_transaction()
    send_at_once(other, [4])
    send_at_once(plain, [5])
    other.commit_transaction(30)  # 6, which Kafka writes after it has answered
    await eventually("the marker is written", lambda: last_stable_offset(bootstrap_servers, topic) == 7)
    open_one.begin_transaction()
    send_at_once(open_one, [7])
    send_at_once(plain, [8])
    async with consuming(bootstrap_servers, topic) as (app, up_to):
        chunks = await up_to(7)
        assert seen(chunks) == expected(2, 4, 5)
        assert chunks[-1].next_offset == 7
        assert await app.consumer.highwaters(TP(topic, 0)) == {TP(topic, 0): 7}
        chunks.clear()
        open_one.commit_transaction(30)
        assert seen(await up_to(10)) == expected(7, 8)


@pytest.mark.services
async def test_consumed_record_of_a_log_append_time_topic_has_the_brokers_time(bootstrap_servers):
    topic = create_topic(bootstrap_servers, timestamp_type="LogAppendTime")
    producer = Producer({"bootstrap.servers": bootstrap_servers})
    before = time.time() * 1000
    producer.produce(topic, b"{}", timestamp=1, partition=0)
    assert producer.flush(30) == 0
    after = time.time() * 1000
    async with consuming(bootstrap_servers, topic) as (_, up_to):
        ((_, (_, _, timestamp, _)),) = seen(await up_to(1))
    assert before - 1 <= timestamp <= after + 1
    assert timestamp == timestamp_as_librdkafka_reads_it(bootstrap_servers, topic)


def last_stable_offset(servers, topic):
    consumer = Consumer({"bootstrap.servers": servers, "group.id": topic})  # which reads committed records by default
    try:
        return consumer.get_watermark_offsets(TopicPartition(topic, 0), 10)[1]
    finally:
        consumer.close()


def timestamp_as_librdkafka_reads_it(servers, topic):
    consumer = Consumer({"bootstrap.servers": servers, "group.id": topic})
    try:
        consumer.assign([TopicPartition(topic, 0, 0)])
        return consumer.poll(30).timestamp()[1]
    finally:
        consumer.close()


@pytest.mark.services
async def test_commit_of_chunk_offsets_is_where_the_next_consumer_begins(bootstrap_servers):
    topic = create_topic(bootstrap_servers)
    producer = Producer({"bootstrap.servers": bootstrap_servers})
    send(producer, topic, range(10))
    assert producer.flush(30) == 0
    tp = TP(topic, 0)
    async with consuming(bootstrap_servers, topic) as (app, up_to):
        await up_to(10)
        assert app.consumer.committed_offset(tp) == 0  # nothing is committed: read from the beginning
        assert await app.consumer.commit_offsets({tp: 4}) is True
        assert await app.consumer.commit_offsets({TP(topic, 99): 1}) is False
    async with consuming(bootstrap_servers, topic) as (app, up_to):
        chunks = await up_to(10)
        assert app.consumer.committed_offset(tp) == 4
    assert seen(chunks) == expected(*range(4, 10))
