"""Which incarnation of the batches topic the sink's progress belongs to."""

import pytest

from pipeline.errors import ServiceUnavailable, TopicMismatch
from pipeline.kafka.topics import TopicFacts
from pipeline.postgres.progress import PartitionId, Received
from pipeline.postgres.store import Applied
from pipeline.settings import Settings
from pipeline.sink import BatchesTopic, batches_topic

RECEIVED = [Received(7, None)]


class Kafka:
    """Describes the batches topic, each time it answers."""

    def __init__(self):
        self.now = "first-id"
        self.outages = 0

    async def topic_id(self):
        return self.now

    async def require_topics(self, client_config, specs):
        if self.outages:
            self.outages -= 1
            raise ServiceUnavailable("Kafka can't be reached")
        return {"batches": TopicFacts("batches", self.now, 4)}


class Store:
    def __init__(self):
        self.applied = []

    async def next_offsets(self, topic_id, partitions):
        return dict.fromkeys(partitions, 5) if topic_id == "first-id" else {}

    async def apply(self, target, received, reject, *, earliest):
        self.applied.append((target, received, earliest))
        return Applied()


@pytest.fixture
def kafka(monkeypatch):
    kafka = Kafka()
    monkeypatch.setattr(batches_topic, "require_topics", kafka.require_topics)
    monkeypatch.setattr(batches_topic, "_RETRY_SECONDS", 0)
    return kafka


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def topic(kafka, store):
    return BatchesTopic(Settings(), TopicFacts("batches", "first-id", 4), store, kafka)


async def test_reading_starts_where_postgres_says(topic):
    assert await topic.locate([0, 2]) == {0: 5, 2: 5}


async def test_locate_waits_out_an_outage_of_kafka(topic, kafka):
    kafka.outages = 3
    assert await topic.locate([0]) == {0: 5}
    assert kafka.outages == 0


async def test_recreated_topic_is_refused_until_its_own_progress_was_read(topic, kafka, store):
    kafka.now = "second-id"
    with pytest.raises(TopicMismatch, match="batches was recreated"):
        await topic.apply(0, RECEIVED, None, earliest=0)
    assert store.applied == []
    assert await topic.locate([0]) == {}  # nothing of the new topic is applied yet
    await topic.apply(0, RECEIVED, None, earliest=3)
    assert store.applied == [(PartitionId("second-id", 0, "batches"), RECEIVED, 3)]


async def test_records_of_a_deleted_topic_are_still_applied(topic, kafka, store):
    kafka.now = None
    await topic.apply(1, RECEIVED, None, earliest=0)
    assert store.applied == [(PartitionId("first-id", 1, "batches"), RECEIVED, 0)]
