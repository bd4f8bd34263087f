"""MetadataProducer against a real Kafka: what is queued, what is refused, what is dropped."""

import time
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest
import structlog
from aiokafka.partitioner import DefaultPartitioner
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

import pipeline.producer
from pipeline.core.report import MAX_KEY_CHARS, MAX_REPORT_KEYS_BYTES, MAX_VALUE_BYTES, Entry, Report, decode_report
from pipeline.producer import DROP_WARNING_SECONDS, MetadataProducer

pytestmark = pytest.mark.services

PARTITIONS = 8
A1 = uuid.UUID("0b7c1e1c-3a54-4be5-9f0e-2a8f7b1ac001")
T0 = datetime(2024, 1, 1, tzinfo=UTC)
NOBODY = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}


@pytest.fixture
def topic(bootstrap_servers):
    name = f"producer-{uuid.uuid4()}"
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})  # named, because it must outlive the wait
    admin.create_topics([NewTopic(name, PARTITIONS)])[name].result(30)
    return name


@pytest.fixture
def producer(bootstrap_servers, topic):
    producer = MetadataProducer({"bootstrap.servers": bootstrap_servers}, topic=topic)
    yield producer
    assert producer.close() == 0


def records(servers, topic):
    """Return all records of a topic, by partition and offset."""
    consumer = Consumer({"bootstrap.servers": servers, "group.id": topic, "enable.partition.eof": True})
    try:
        consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
        messages, ended, deadline = [], 0, time.monotonic() + 30
        while ended < PARTITIONS:
            assert time.monotonic() < deadline, "the topic's ends were not reached"
            record = consumer.poll(1)
            if record is None:
                continue
            if record.error():
                ended += 1
            else:
                messages.append(record)
    finally:
        consumer.close()
    return sorted(messages, key=lambda record: (record.partition(), record.offset()))


@pytest.fixture
def sent(bootstrap_servers, topic, producer):
    """Return a function that flushes and returns the reports that are in Kafka, decoded."""

    def sent():
        assert producer.flush() == 0
        return [decode_report(record.value())[0] for record in records(bootstrap_servers, topic)]

    return sent


def test_add_sends_one_record_keyed_by_the_agent_id(bootstrap_servers, topic, producer):
    assert producer.add(A1, ["cpu", "mem"], ["12%", ""], ["", "no such file"], T0) is True
    assert producer.flush() == 0
    (record,) = records(bootstrap_servers, topic)
    assert record.key() == str(A1).encode()
    report = Report(str(A1), [Entry("cpu", "12%"), Entry("mem", "", "no such file")], T0)
    assert decode_report(record.value()) == (report, None)


def test_add_puts_each_agent_where_javas_murmur2_does(bootstrap_servers, topic, producer):
    agents = [uuid.uuid5(uuid.NAMESPACE_OID, str(number)) for number in range(100)]
    for agent_id in agents:
        producer.add(agent_id, ["k"], ["v"], [""])
    assert producer.flush() == 0
    numbers = list(range(PARTITIONS))
    java = {
        str(agent_id).encode(): DefaultPartitioner()(str(agent_id).encode(), numbers, numbers) for agent_id in agents
    }
    assert {record.key(): record.partition() for record in records(bootstrap_servers, topic)} == java
    assert len(set(java.values())) == PARTITIONS


def test_add_keeps_an_agents_reports_in_order(producer, sent):
    for number in range(500):
        producer.add(A1, ["k"], [str(number)], [""])
    assert [report.entries[0].value for report in sent()] == [str(number) for number in range(500)]


def test_add_with_a_time_for_each_key_keeps_them_apart(producer, sent):
    times = [T0, datetime(2024, 1, 1, 2, tzinfo=timezone(timedelta(hours=1)))]
    producer.add(A1, ["a", "b"], ["1", "2"], ["", ""], times)
    (report,) = sent()
    assert report.collected_at is None
    assert [entry.collected_at for entry in report.entries] == [T0, T0 + timedelta(hours=1)]


def test_add_without_a_time_sends_none(producer, sent):
    producer.add(A1, ["k"], ["v"], [""])
    (report,) = sent()
    assert (report.collected_at, report.entries[0].collected_at) == (None, None)


def test_add_without_keys_sends_nothing(producer, sent):
    assert producer.add(A1, [], [], [], T0) is True
    assert sent() == []


@pytest.mark.parametrize(
    ("keys", "values", "errors", "times"),
    [
        (["a", "b"], ["1"], ["", ""], T0),
        (["a"], ["1"], ["", "", ""], T0),
        (["a"], ["1"], [""], [T0, T0]),
        ([], ["1"], [""], None),
    ],
)
def test_add_of_unequal_lengths_names_them_all_and_queues_nothing(producer, sent, keys, values, errors, times):
    with pytest.raises(ValueError, match="same length") as raised:
        producer.add(A1, keys, values, errors, times)
    counted = len(times) if isinstance(times, list) else len(keys)
    for name, count in (("keys", keys), ("values", values), ("errors", errors)):
        assert f"{name} ({len(count)})" in str(raised.value)
    assert f"collected_at ({counted})" in str(raised.value)
    assert sent() == []


def test_add_of_a_time_outside_the_years_1_to_9999_is_refused(producer):
    far = datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-14)))
    with pytest.raises(ValueError, match="outside the years 1 to 9999"):
        producer.add(A1, ["a"], ["1"], [""], far)


@pytest.mark.parametrize("naive", [datetime(2024, 1, 1), [T0, datetime(2024, 1, 1)]])
def test_add_of_a_naive_time_is_refused_and_queues_nothing(producer, sent, naive):
    with pytest.raises(ValueError, match="2024-01-01T00:00:00 has no time zone"):
        producer.add(A1, ["a", "b"], ["1", "2"], ["", ""], naive)
    assert sent() == []


def test_add_of_a_key_over_127_characters_is_refused_and_queues_nothing(producer, sent):
    with pytest.raises(ValueError, match="key of 128 characters exceeds 127"):
        producer.add(A1, ["fine", "k" * (MAX_KEY_CHARS + 1)], ["1", "2"], ["", ""], T0)
    assert sent() == []


def test_add_of_a_key_of_127_wide_characters_is_taken(producer, sent):
    producer.add(A1, ["ü" * MAX_KEY_CHARS], ["1"], [""], T0)
    assert [report.entries for report in sent()] == [[Entry("ü" * MAX_KEY_CHARS, "1")]]


def test_add_of_too_many_key_bytes_raises_and_queues_what_came_before(producer, sent):
    keys = [f"{number:0100}" for number in range(MAX_REPORT_KEYS_BYTES // 100 + 2)]
    with pytest.raises(ValueError, match="keys exceeded 6144 bytes: the last 2 entries were left out"):
        producer.add(A1, keys, ["v"] * len(keys), [""] * len(keys), T0)
    assert [[entry.key for entry in report.entries] for report in sent()] == [keys[:-2]]


def test_add_cuts_a_value_over_2048_bytes_and_says_so_as_coder_does(producer, sent):
    producer.add(A1, ["k"], ["v" * (MAX_VALUE_BYTES + 1)], [""], T0)
    (report,) = sent()
    assert report.entries == [Entry("k", "v" * MAX_VALUE_BYTES, "value of 2049 bytes exceeded 2048 bytes")]


def test_add_of_a_report_too_large_for_a_record_raises_and_queues_nothing(producer, sent):
    keys = [f"k{number}" for number in range(300)]
    with pytest.raises(ValueError, match=r"report of \d+ bytes .* too large"):
        producer.add(A1, keys, ["v" * 2048] * 300, ["e" * 2048] * 300, T0)
    assert sent() == []


def test_add_leaves_the_callers_sequences_alone(producer):
    keys, values, errors = ["k"], ["v" * 5000], ["\0"]
    producer.add(A1, keys, values, errors, T0)
    assert (keys, values, errors) == (["k"], ["v" * 5000], ["\0"])


def dropped_keys(registry):
    return registry.get_sample_value("agent_metadata_dropped_keys_total")


@pytest.fixture
def full():
    """A producer whose queue, of one report, is full; and its registry."""
    registry = CollectorRegistry()
    producer = MetadataProducer(NOBODY, registry=registry, max_queued_reports=1)
    assert producer.add(A1, ["k"], ["v"], [""]) is True
    yield producer, registry
    producer.close(0)


def test_add_to_a_full_queue_returns_false_and_counts_the_keys(full):
    producer, registry = full
    with capture_logs():
        assert producer.add(A1, ["a", "b", "c"], ["1", "2", "3"], [""] * 3) is False
        assert producer.add(A1, ["a"], ["1"], [""]) is False
    assert dropped_keys(registry) == 4


def test_add_to_a_full_queue_never_blocks(full):
    producer, _ = full
    started = time.monotonic()
    with capture_logs():
        for _ in range(1000):
            producer.add(A1, ["k"], ["v"], [""])
    assert time.monotonic() - started < 2


def test_add_to_a_full_queue_warns_at_most_every_10_seconds_of_all_that_was_dropped(full, monkeypatch):
    producer, _ = full
    now = [1000.0]
    monkeypatch.setattr(pipeline.producer.time, "monotonic", lambda: now[0])

    def drops(count):
        with capture_logs() as logs:
            for _ in range(count):
                producer.add(A1, ["a", "b"], ["1", "2"], ["", ""])
        return [entry["dropped_keys"] for entry in logs if entry["event"] == "local_queue_full"]

    assert drops(3) == [2]
    now[0] += DROP_WARNING_SECONDS - 0.001
    assert drops(3) == []
    now[0] += 0.001
    assert drops(1) == [2 * (2 + 3 + 1)]


def test_add_of_too_many_key_bytes_to_a_full_queue_counts_the_drop_too(full):
    producer, registry = full
    keys = [f"{number:0100}" for number in range(MAX_REPORT_KEYS_BYTES // 100 + 2)]
    with capture_logs(), pytest.raises(ValueError, match="left out"):
        producer.add(A1, keys, ["v"] * len(keys), [""] * len(keys), T0)
    assert dropped_keys(registry) == len(keys) - 2


def test_close_returns_how_many_reports_were_not_acknowledged(full):
    assert full[0].close(0.1) == 1


def test_add_after_close_raises(producer):
    producer.close()
    with pytest.raises(RuntimeError, match="closed"):
        producer.add(A1, ["k"], ["v"], [""])


def test_leaving_the_context_flushes(bootstrap_servers, topic):
    with MetadataProducer({"bootstrap.servers": bootstrap_servers}, topic=topic) as producer:
        producer.add(A1, ["k"], ["v"], [""], T0)
    assert len(records(bootstrap_servers, topic)) == 1


def test_report_that_kafka_refuses_is_counted_and_logged(bootstrap_servers):
    registry = CollectorRegistry()
    with capture_logs() as logs:
        config = {"bootstrap.servers": bootstrap_servers, "topic.metadata.propagation.max.ms": 0}
        with MetadataProducer(config, topic="there-is-no-such-topic", registry=registry) as producer:
            producer.add(A1, ["k"], ["v"], [""])
    assert registry.get_sample_value("agent_metadata_failed_deliveries_total") == 1
    assert [entry["event"] for entry in logs] == ["report_not_delivered"]
    assert (producer.flush(), producer.close()) == (0, 1)


def test_what_is_dropped_is_logged_by_the_logger_that_was_given():
    with capture_logs() as logs:
        logger = structlog.get_logger("of-the-test").bind(service="agents")
        producer = MetadataProducer(NOBODY, logger=logger, max_queued_reports=1)
        for _ in range(2):
            producer.add(A1, ["k"], ["v"], [""])
    assert [entry["service"] for entry in logs if entry["event"] == "local_queue_full"] == ["agents"]
