"""How much memory a worker and a sink take at most: 2,000,000 pairs in open windows, and hours of batches in one go.

The load is 1,000,000 reports of ten keys, five of each of 200,000 agents, into 8 partitions. `worker, default` keeps
its windows to 50,000 pairs a partition and closes them early. `worker, all pairs` may hold all 2,000,000 at once.
The sink was stopped meanwhile: it starts with all batches of the default worker in front of it, 10,000,000 rows.
Peaks are the kernel's own (VmHWM), of one process each.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from rich.console import Console
from rich.table import Table

from bench.harness import agent_ids, conditions, say, write
from pipeline.core.report import Entry, Report, encode_report
from pipeline.local import start_services
from pipeline.settings import Settings
from tests.support.deployment import Deployment, eventually

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


async def run_role(pipeline: Deployment, role: str, group: str, topic: str) -> dict[str, int]:
    """Let one process use up its topic; return what it took at its start and at most, in MiB."""
    process = await pipeline.started(role)
    at_start = memory_mib(process.pid, "VmRSS")
    await eventually(f"the {role} is done", lambda: lag(pipeline.settings, group, topic) == 0, WAIT_SECONDS)
    figures = {"at_start_mib": at_start, "peak_mib": memory_mib(process.pid, "VmHWM")}
    assert pipeline.stop(process) == 0
    say(f"{role}: {figures}")
    return figures


async def measure(services: Any, folder: Path) -> dict[str, dict[str, int]]:
    common = {"partitions": PARTITIONS, "session_timeout_seconds": 30}
    # Windows far longer than the run: all pairs are in flight until capacity, or the end of the backlog, closes them.
    pipeline = Deployment(
        services.bootstrap_servers, services.database_url, folder, **common, window_seconds=3600, window_capacity=50_000
    )
    await pipeline.prepare()
    settings = pipeline.settings
    await asyncio.to_thread(produce, settings)
    figures = {"worker, default": await run_role(pipeline, "worker", settings.worker_group, settings.events_topic)}
    figures["sink, 10,000,000 rows waiting"] = await run_role(
        pipeline, "sink", settings.sink_group, settings.batches_topic
    )
    # The same events once more, for a group of its own.
    pipeline.environment["AGENT_METADATA_CONSUMER_GROUP"] = group = "all-pairs"
    pipeline.environment["AGENT_METADATA_WINDOW_CAPACITY"] = str(PAIRS)
    figures["worker, all pairs"] = await run_role(pipeline, "worker", f"{group}-worker", settings.events_topic)
    pipeline.close()
    return figures


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, start_services("packages", say=say) as services:
        figures = asyncio.run(measure(services, Path(folder)))
        versions = f"{services.broker}; {services.database}"
    table = Table("process", "at start, MiB", "peak, MiB", title="memory")
    for name, item in figures.items():
        table.add_row(name, str(item["at_start_mib"]), str(item["peak_mib"]))
    Console().print(table)
    summary = {"benchmark": "memory", **conditions(versions), "note": __doc__, "pairs": PAIRS, "figures": figures}
    write("memory", summary)


if __name__ == "__main__":
    sys.exit(main())
