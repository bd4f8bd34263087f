"""How much of a deployment's topics is still to be processed."""

from __future__ import annotations

import asyncio
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from pipeline.kafka.topics import require_topics
from tests.support.deployment import Deployment


async def lag(deployment: Deployment, connection: Any) -> dict[str, int]:
    """How many records wait: of events by what the workers committed, of batches by the progress in Postgres."""
    events = await asyncio.to_thread(_events_lag, deployment)
    return {"events": events, "batches": await _batches_lag(deployment, connection)}


def ends(servers: str, topic: str) -> dict[int, int]:
    """Where each partition of a topic ends now."""
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "chaos"})
    try:
        numbers = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        return {n: consumer.get_watermark_offsets(TopicPartition(topic, n), timeout=10)[1] for n in numbers}
    finally:
        consumer.close()


def _events_lag(deployment: Deployment) -> int:
    settings = deployment.settings
    servers = settings.kafka_bootstrap_servers
    consumer = Consumer({"bootstrap.servers": servers, "group.id": settings.worker_group})
    try:
        end_offsets = ends(servers, settings.events_topic)
        partitions = [TopicPartition(settings.events_topic, number) for number in end_offsets]
        committed = {item.partition: max(0, item.offset) for item in consumer.committed(partitions, timeout=10)}
    finally:
        consumer.close()
    return sum(end - min(committed[number], end) for number, end in end_offsets.items())


async def _batches_lag(deployment: Deployment, connection: Any) -> int:
    settings = deployment.settings
    batches = (await require_topics(settings.client_config(), settings.declared_topics()))["batches"]
    end_offsets = await asyncio.to_thread(ends, settings.kafka_bootstrap_servers, batches.name)
    rows = await connection.fetch(
        "select partition, next_offset from agent_metadata_progress where topic_id = $1", batches.topic_id
    )
    applied = {row["partition"]: row["next_offset"] for row in rows}
    return sum(end - applied.get(number, 0) for number, end in end_offsets.items())
