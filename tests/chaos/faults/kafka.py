"""Faults of Kafka and of its topics."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from confluent_kafka import TopicPartition
from confluent_kafka.admin import NewPartitions

from pipeline.kafka.topics import create_topics
from tests.chaos.faults.reports import catch_up, start_load, stop_load
from tests.chaos.harness import Action, Run

RETENTION_SECONDS = 2.0


async def restart(run: Run) -> None:
    await asyncio.to_thread(run.services.kafka.restart)


@asynccontextmanager
async def crashed(run: Run) -> AsyncIterator[None]:
    """Killed, and started in the end."""
    await asyncio.to_thread(run.services.kafka.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(run.services.kafka.start)


@asynccontextmanager
async def stopped(run: Run) -> AsyncIterator[None]:
    """Shut down, and started in the end."""
    await asyncio.to_thread(run.services.kafka.stop)
    try:
        yield
    finally:
        await asyncio.to_thread(run.services.kafka.start)


def delete_topic(role: str) -> Action:
    """Delete a topic: events, batches or dead_letter."""

    async def act(run: Run) -> None:
        name = run.deployment.settings.topic_names[role]
        await run.ask_kafka(lambda admin: admin.delete_topics([name]))

    return act


async def create_topics_again(run: Run) -> None:
    """Create the topics that are missing; their offsets begin at 0."""
    settings = run.deployment.settings
    await asyncio.to_thread(create_topics, settings.client_config(), settings.declared_topics())


async def recreate_topics(run: Run) -> None:
    """Delete events and batches, and create them."""
    await delete_topic("events")(run)
    await delete_topic("batches")(run)
    await create_topics_again(run)


async def replace_cluster(run: Run) -> None:
    """Another cluster at the same address: no topics, no groups, no offsets."""
    kafka = run.services.kafka
    await asyncio.to_thread(kafka.kill)
    await asyncio.to_thread(shutil.rmtree, kafka.data_dir)
    await asyncio.to_thread(kafka.start)
    await create_topics_again(run)


async def lose_events_to_retention(run: Run) -> None:
    """Stop the only worker, and delete what is reported meanwhile, as retention would; the oracle forgets it too."""
    topic = run.deployment.settings.events_topic
    (worker,) = run.active("worker")
    await stop_load(run)
    await catch_up(run)
    begins = await asyncio.to_thread(run.ends, topic)
    await worker.leave()
    await start_load(run)
    await asyncio.sleep(RETENTION_SECONDS)
    await stop_load(run)
    ends = await asyncio.to_thread(run.ends, topic)
    await run.ask_kafka(lambda admin: admin.delete_records([TopicPartition(topic, *end) for end in ends.items()]))
    lost = run.load.forget({number: (begins.get(number, 0), end) for number, end in ends.items()})
    assert lost, "nothing was reported meanwhile, so the scenario shows nothing"
    await start_load(run)
    run.join("worker")


def add_partitions(count: int) -> Action:
    """Add partitions to both topics; an agent's reports may come from two of them for a while."""

    async def act(run: Run) -> None:
        run.load.ties = False
        settings = run.deployment.settings
        for topic in (settings.batches_topic, settings.events_topic):
            partitions = NewPartitions(topic, count)
            await run.ask_kafka(lambda admin, partitions=partitions: admin.create_partitions([partitions]))  # type: ignore[misc]

    return act
