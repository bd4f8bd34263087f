"""Topics as code, against a real Kafka and against the embedded broker."""

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    ResourceType,
)

from pipeline.core.replication import Replication
from pipeline.errors import ServiceUnavailable, TopicMismatch
from pipeline.kafka.topics import (
    Difference,
    create_topics,
    delete_topics,
    diff_topics,
    load_topic_specs,
    require_topics,
)
from pipeline.local import MockBroker
from tests.support.topics import recreate_topics

pytestmark = pytest.mark.services

NOBODY = {"bootstrap.servers": "127.0.0.1:1"}
ROLES = ("events", "batches", "dead_letter")


@pytest.fixture
def kafka(bootstrap_servers):
    return {"bootstrap.servers": bootstrap_servers}


@pytest.fixture
def specs():
    """Declarations of topics for this test alone, of 3 partitions."""
    test = uuid.uuid4().hex[:8]
    return load_topic_specs(names={role: f"{role}.{test}" for role in ROLES}, partitions=3)


@pytest.fixture(scope="module")
def embedded():
    with MockBroker() as broker:
        yield {"bootstrap.servers": broker.bootstrap_servers}


def names_of(specs):
    return {spec.name for spec in specs.values()}


def set_config(kafka, topic, name, value):
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient(kafka)
    admin.incremental_alter_configs([resource])[resource].result(30)
    deadline = time.monotonic() + 30  # acknowledged by the controller, it reaches the broker a moment later
    while admin.describe_configs([resource])[resource].result(30)[name].value != value:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def add_partitions(kafka, topic, total):
    admin = AdminClient(kafka)
    admin.create_partitions([NewPartitions(topic, total)])[topic].result(30)
    deadline = time.monotonic() + 30
    while len(admin.list_topics(topic, timeout=10).topics[topic].partitions) < total:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_create_makes_topics_exactly_as_declared(kafka, specs):
    assert set(create_topics(kafka, specs)) == names_of(specs)
    assert diff_topics(kafka, specs) == []
    facts = asyncio.run(require_topics(kafka, specs, timeout_s=10))
    assert {role: found.partitions for role, found in facts.items()} == {"events": 3, "batches": 3, "dead_letter": 1}


def test_create_again_leaves_existing_topics_alone(kafka, specs):
    create_topics(kafka, specs)
    set_config(kafka, specs["events"].name, "retention.ms", "1000")
    assert create_topics(kafka, specs) == []
    assert diff_topics(kafka, specs) == [
        Difference(specs["events"].name, "retention.ms", specs["events"].config["retention.ms"], "1000")
    ]


def test_create_three_times_at_once_creates_each_topic_once(kafka, specs):
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(create_topics, kafka, specs) for _ in range(3)]
    created = [name for run in runs for name in run.result()]
    assert sorted(created) == sorted(names_of(specs))


def test_create_refused_by_kafka_names_topic_and_reason(kafka, specs):
    unlucky = replace(specs["events"], replication=Replication(99))
    with pytest.raises(TopicMismatch, match=rf"refused to create {unlucky.name}: .*99") as caught:
        create_topics(kafka, {"events": unlucky})
    assert "\n" not in str(caught.value)


def test_diff_of_missing_topics_says_so(kafka, specs):
    differences = diff_topics(kafka, specs)
    assert {(item.topic, item.field, item.actual) for item in differences} == {
        (name, "topic", "missing") for name in names_of(specs)
    }


def test_diff_finds_another_number_of_partitions(kafka, specs):
    create_topics(kafka, specs)
    add_partitions(kafka, specs["batches"].name, 4)
    assert diff_topics(kafka, specs) == [Difference(specs["batches"].name, "partitions", "3", "4")]


def test_require_missing_topics_names_them_and_the_command(kafka, specs):
    create_topics(kafka, {"events": specs["events"]})
    with pytest.raises(TopicMismatch, match="agent-metadata topics create") as caught:
        asyncio.run(require_topics(kafka, specs, timeout_s=10))
    assert specs["batches"].name in str(caught.value)
    assert specs["events"].name not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_require_unequal_partitions_is_refused(kafka, specs):
    create_topics(kafka, specs)
    add_partitions(kafka, specs["events"].name, 5)
    with pytest.raises(TopicMismatch, match=r"has 5 partitions and .* has 3"):
        asyncio.run(require_topics(kafka, specs, timeout_s=10))


def test_recreated_topic_has_another_id(kafka, specs):
    create_topics(kafka, specs)
    before = asyncio.run(require_topics(kafka, specs, timeout_s=10))
    assert asyncio.run(require_topics(kafka, specs, timeout_s=10)) == before
    asyncio.run(recreate_topics(kafka, {"events": specs["events"]}))
    after = asyncio.run(require_topics(kafka, specs, timeout_s=10))
    assert after["events"].topic_id != before["events"].topic_id
    assert after["batches"] == before["batches"]


def test_delete_of_topics_that_do_not_exist_is_fine(kafka, specs):
    delete_topics(kafka, specs)


def test_unreachable_kafka_is_unavailable_within_the_timeout_and_quiet(specs, capfd):
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=r"Kafka at 127\.0\.0\.1:1 can't be reached: .*refused") as caught:
        asyncio.run(require_topics(NOBODY, specs, timeout_s=1))
    assert time.monotonic() - began < 3
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_embedded_broker_makes_the_topics_it_is_asked_for(embedded, specs):
    assert set(create_topics(embedded, specs)) == names_of(specs)
    assert create_topics(embedded, specs) == []


def test_embedded_broker_has_names_for_ids(embedded, specs):
    create_topics(embedded, specs)
    facts = asyncio.run(require_topics(embedded, specs, timeout_s=10))
    assert {role: found.topic_id for role, found in facts.items()} == {
        role: f"name:{spec.name}" for role, spec in specs.items()
    }


def test_embedded_broker_diff_is_of_partitions_alone(embedded, specs):
    create_topics(embedded, specs)
    differences = diff_topics(embedded, specs)
    assert {(item.topic, item.field, item.actual) for item in differences} == {
        (name, "partitions", "4") for name in names_of(specs)
    }
