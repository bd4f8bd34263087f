"""The sink against the bare UPDATE, on 200,000 existing rows in batches of 500.

The bare side runs the statement of sql/update_rows.sql for each batch over asyncpg, on as many connections as the sink
uses, one transaction each, with columns that were decoded beforehand. Ours is the command `agent-metadata sink`: it
consumes, decodes, merges, sorts, keeps its progress and notifies. Its clock starts when its partitions are assigned and
ends when its progress has reached the end of the topic.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
from confluent_kafka import Producer

from bench import harness
from pipeline.core.batch import Batch, Source, WindowSpan, encode_batch
from pipeline.kafka.topics import require_topics
from pipeline.local import start_services
from pipeline.local.deployment import Deployment
from pipeline.postgres.migrations import migrate
from pipeline.postgres.statements import statement
from pipeline.roles.sink import SINK_CONNECTIONS

AGENTS, KEYS, BATCH_SIZE = 20_000, 10, 500
RUNS = 5


def rows(round_number: int) -> dict[int, list[list[Any]]]:
    """Make the columns of each batch, by partition: all pairs once, an agent's pairs in one partition."""
    dice = random.Random(round_number)
    us = round(datetime.now(UTC).timestamp() * 1e6)
    agents = harness.agent_ids(AGENTS)
    dice.shuffle(agents)
    batches: dict[int, list[list[Any]]] = {}
    for partition in range(harness.PARTITIONS):
        # Sorted, as the worker makes them: one window's parts.
        own = sorted(agents[partition :: harness.PARTITIONS])
        pairs = [(agent, f"key{key:02}") for agent in own for key in range(KEYS)]
        for start in range(0, len(pairs), BATCH_SIZE):
            part = pairs[start : start + BATCH_SIZE]
            values = [f"value {round_number} {number}" for number in range(len(part))]
            columns = [[pair[0] for pair in part], [pair[1] for pair in part], values]
            batches.setdefault(partition, []).append([*columns, [""] * len(part), [us] * len(part)])
    return batches


async def prepare(url: str) -> None:
    connection = await asyncpg.connect(url)
    await migrate(connection)
    for columns in (column for batches in rows(0).values() for column in batches):
        await connection.execute(statement("insert_rows"), *columns)
    await connection.execute("vacuum analyze workspace_agent_metadata")
    await connection.close()


async def tidy(url: str) -> None:
    """Give each run the same start: no dead rows, no pending checkpoint."""
    connection = await asyncpg.connect(url)
    await connection.execute("vacuum workspace_agent_metadata")
    await connection.execute("checkpoint")
    await connection.close()


def bare(url: str, number: int) -> float:
    batches = [columns for of_partition in rows(number).values() for columns in of_partition]

    async def update(connection: Any, waiting: list[list[Any]]) -> None:
        while waiting:
            await connection.fetchrow(statement("update_rows"), *waiting.pop())

    async def main() -> float:
        await tidy(url)
        off = {f"enable_{way}": "off" for way in ("hashjoin", "mergejoin", "seqscan", "bitmapscan")}
        connections = [await asyncpg.connect(url, server_settings=off) for _ in range(SINK_CONNECTIONS)]
        waiting = list(batches)
        started = time.perf_counter()
        await asyncio.gather(*(update(connection, waiting) for connection in connections))
        seconds = time.perf_counter() - started
        for connection in connections:
            await connection.close()
        return AGENTS * KEYS / seconds

    return asyncio.run(main())


def fill_batches(servers: str, topic: str, number: int) -> int:
    harness.create_topic(servers, topic)
    producer = Producer({"bootstrap.servers": servers, "compression.type": "lz4", "linger.ms": 20})
    count = 0
    for partition, batches in rows(number).items():
        for offset, columns in enumerate(batches):
            source = Source("events", f"events-{number}", partition, offset, offset)
            batch = Batch(source, WindowSpan(0, 1), "scheduled", 1, 1, *columns)
            producer.produce(topic, encode_batch(batch), partition=partition)
            count += 1
    producer.flush()
    return count


def ours(url: str, servers: str, folder: Path, number: int) -> float:
    topic = f"batches-{number}-{uuid.uuid4().hex[:4]}"
    expected = fill_batches(servers, topic, number)
    deployment = Deployment(
        servers, url, folder, events_topic="events", batches_topic=topic, dead_letter_topic="dead", log_format="json"
    )
    found = require_topics(deployment.settings.client_config(), deployment.topics, timeout_s=10)
    topic_id = asyncio.run(found)["batches"].topic_id
    asyncio.run(tidy(url))
    sink = asyncio.run(deployment.started("sink"))
    started = time.perf_counter()
    asyncio.run(wait_for_progress(url, topic_id, expected))
    seconds = time.perf_counter() - started
    deployment.stop(sink)
    return AGENTS * KEYS / seconds


async def wait_for_progress(url: str, topic_id: str, expected: int) -> None:
    connection = await asyncpg.connect(url)
    query = "select coalesce(sum(next_offset), 0) from agent_metadata_progress where topic_id = $1"
    while await connection.fetchval(query, topic_id) < expected:
        await asyncio.sleep(0.005)
    await connection.close()


def main() -> None:
    with start_services(say=harness.say) as services, tempfile.TemporaryDirectory() as folder:
        url, servers = services.database_url, services.bootstrap_servers
        harness.create_topic(servers, "events")
        harness.create_topic(servers, "dead", 1)
        asyncio.run(prepare(url))
        numbers = iter(range(1, 1000))
        figures = harness.in_turn(
            {
                "bare": lambda: bare(url, next(numbers)),
                "ours": lambda: ours(url, servers, Path(folder), next(numbers)),
            },
            RUNS,
        )
        harness.report(
            "sink",
            unit="rows a second",
            services=f"{services.broker}; {services.database}",
            figures=figures,
            ratios={"sink_vs_bare_update": harness.ratio(figures, "ours", "bare")},
            note=__doc__ or "",
        )


if __name__ == "__main__":
    main()
