"""How much memory a worker and a sink take at most: 2,000,000 pairs in open windows, and hours of batches at once.

The load is 1,000,000 reports of ten keys, five of each of 200,000 agents, into 8 partitions. `worker, default` keeps
its windows to 50,000 pairs a partition and closes them early. `worker, all pairs` may hold all 2,000,000 at once.
The sink was stopped meanwhile: it starts with all batches of the default worker in front of it, 10,000,000 rows.
Peaks are the kernel's own (VmHWM), of one process each.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncpg
from confluent_kafka import Consumer, Producer, TopicPartition
from rich.console import Console
from rich.table import Table

from bench.harness import agent_ids, conditions, say, write
from pipeline.core.report import Entry, Report, encode_report
from pipeline.kafka.topics import create_topics
from pipeline.local import LocalServices, start_services
from pipeline.postgres.migrations import migrate
from pipeline.settings import PREFIX, Settings, load_settings

AGENTS, KEYS, ROUNDS, PARTITIONS = 200_000, 10, 5, 8
PAIRS = AGENTS * KEYS
WAIT_SECONDS = 1200.0


def memory_mib(pid: int, what: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return round(int(status.split(f"{what}:")[1].split()[0]) / 1024)


def produce(settings: Settings) -> None:
    producer = Producer(
        {
            **settings.client_config(),
            "compression.type": "lz4",
            "linger.ms": 50,
            "partitioner": "murmur2",
            "queue.buffering.max.messages": 2_000_000,
        }
    )
    ids = agent_ids(AGENTS)
    for number in range(ROUNDS):
        for agent_id in ids:
            entries = [Entry(f"key{key:02}", f"value {number} of {key}") for key in range(KEYS)]
            producer.produce(settings.events_topic, encode_report(Report(agent_id, entries)), agent_id)
        say(f"produced {(number + 1) * AGENTS:,} reports")
        producer.poll(0)
    assert producer.flush(120) == 0


def lag(settings: Settings, group: str, topic: str) -> int:
    consumer = Consumer({**settings.client_config(), "group.id": group})
    try:
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        ends = {item.partition: consumer.get_watermark_offsets(item, 10)[1] for item in partitions}
        done = {item.partition: max(item.offset, 0) for item in consumer.committed(partitions, timeout=10)}
        return sum(ends[number] - done[number] for number in ends)
    finally:
        consumer.close()


def run_role(role: str, options: dict[str, Any]) -> dict[str, int]:
    """Let one process use up its topic; return what it took at its start and at most, in MiB."""
    settings = load_settings(**options)
    group, topic = {
        "worker": (settings.worker_group, settings.events_topic),
        "sink": (settings.sink_group, settings.batches_topic),
    }[role]
    deadline = time.monotonic() + WAIT_SECONDS
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", role], env={**os.environ, **environment_of(options)}, stderr=log
        )
        try:
            at_start = 0
            while not at_start or lag(settings, group, topic) > 0:
                text = Path(log.name).read_text(encoding="utf-8")
                assert process.poll() is None, text
                assert time.monotonic() < deadline, f"the {role} is not done after {WAIT_SECONDS:.0f} s"
                if not at_start and '"partitions_assigned"' in text:
                    at_start = memory_mib(process.pid, "VmRSS")
                time.sleep(0.1)
            figures = {"at_start_mib": at_start, "peak_mib": memory_mib(process.pid, "VmHWM")}
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
    say(f"{role}: {figures}")
    return figures


def environment_of(options: dict[str, Any]) -> dict[str, str]:
    unprefixed = {"kafka_bootstrap_servers", "database_url"}
    return {("" if name in unprefixed else PREFIX) + name.upper(): str(value) for name, value in options.items()}


def measure(services: LocalServices) -> dict[str, dict[str, int]]:
    common = {
        "kafka_bootstrap_servers": services.bootstrap_servers,
        "database_url": services.database_url,
        "partitions": PARTITIONS,
        "session_timeout_seconds": 30,
        # Far longer than the run: all pairs are in flight until capacity, or the end of the backlog, closes a window.
        "window_seconds": 3600,
        "log_format": "json",
    }
    settings = load_settings(**common)
    create_topics(settings.client_config(), settings.declared_topics())
    asyncio.run(prepare(services.database_url))
    produce(settings)
    return {
        "worker, default": run_role("worker", {**common, "window_capacity": 50_000}),
        "sink, 10,000,000 rows waiting": run_role("sink", common),
        # The same events a second time, for a group of its own.
        "worker, all pairs": run_role("worker", {**common, "window_capacity": PAIRS, "consumer_group": "all-pairs"}),
    }


async def prepare(url: str) -> None:
    connection = await asyncpg.connect(url)
    await migrate(connection)
    await connection.close()


def main() -> None:
    with start_services("packages", say=say) as services:
        figures = measure(services)
        versions = f"{services.broker}; {services.database}"
    table = Table("process", "at start, MiB", "peak, MiB", title="memory")
    for process, mib in figures.items():
        table.add_row(process, str(mib["at_start_mib"]), str(mib["peak_mib"]))
    Console().print(table)
    summary = {"benchmark": "memory", **conditions(versions), "note": __doc__, "pairs": PAIRS, "figures": figures}
    write("memory", summary)


if __name__ == "__main__":
    sys.exit(main())
