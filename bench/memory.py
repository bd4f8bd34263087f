"""The most memory that a worker and a sink take: 2,000,000 pairs in open windows, and hours of batches at once.

The load is 1,000,000 reports of ten keys, five of each of 200,000 agents, into 8 partitions. `worker, default` keeps
its windows to 50,000 pairs per partition and closes them early. `worker, all pairs` may hold all 2,000,000 at once.
The sink was stopped meanwhile: it starts with all batches of the default worker in front of it, 10,000,000 rows.
`worker, values of 2 kB` is fed one such value of each of 400,000 agents: with the default of OPEN_WINDOWS_BYTES, and
with 1 GiB, which this load does not reach.
Peaks are the kernel's own (VmHWM), of one process each.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from confluent_kafka import Consumer, Producer, TopicPartition
from rich.console import Console
from rich.table import Table

from bench.harness import agent_ids, conditions, say, write
from pipeline.core.report import Entry, Report, encode_report
from pipeline.local import LocalServices, start_services
from pipeline.local.deployment import Deployment
from pipeline.settings import Settings

AGENTS, KEYS, ROUNDS, PARTITIONS = 200_000, 10, 5, 8
PAIRS = AGENTS * KEYS
LARGE_AGENTS, LARGE_VALUE = 400_000, "x" * 2000
WAIT_SECONDS = 1200.0


def memory_mib(pid: int, what: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return round(int(status.split(f"{what}:")[1].split()[0]) / 1024)


def produce(settings: Settings, agents: int, rounds: int, entries: Callable[[int], list[Entry]]) -> None:
    producer = Producer(
        {
            **settings.client_config(),
            "compression.type": "lz4",
            "linger.ms": 50,
            "partitioner": "murmur2",
            "queue.buffering.max.messages": 2_000_000,
        }
    )
    ids = agent_ids(agents)
    for number in range(rounds):
        for agent_id in ids:
            producer.produce(settings.events_topic, encode_report(Report(agent_id, entries(number))), agent_id)
            producer.poll(0)
        say(f"produced {(number + 1) * agents:,} reports")
        producer.poll(0)
    assert producer.flush(120) == 0


def small(number: int) -> list[Entry]:
    return [Entry(f"key{key:02}", f"value {number} of {key}") for key in range(KEYS)]


def large(number: int) -> list[Entry]:
    return [Entry("text", f"{number} {LARGE_VALUE}")]


def lag(settings: Settings, group: str, topic: str) -> int:
    consumer = Consumer({**settings.client_config(), "group.id": group})
    try:
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        ends = {item.partition: consumer.get_watermark_offsets(item, 10)[1] for item in partitions}
        done = {item.partition: max(item.offset, 0) for item in consumer.committed(partitions, timeout=10)}
        return sum(ends[number] - done[number] for number in ends)
    finally:
        consumer.close()


async def run_role(deployment: Deployment, role: str) -> dict[str, int]:
    """Let one process work through its topic; return what it took at its start and at most, in MiB."""
    settings = deployment.settings
    group, topic = {
        "worker": (settings.worker_group, settings.events_topic),
        "sink": (settings.sink_group, settings.batches_topic),
    }[role]
    process = await deployment.started(role)
    at_start = memory_mib(process.pid, "VmRSS")
    deadline = time.monotonic() + WAIT_SECONDS
    while await asyncio.to_thread(lag, settings, group, topic) > 0:
        assert process.poll() is None, deployment.log(process)
        assert time.monotonic() < deadline, f"the {role} is not done after {WAIT_SECONDS:.0f} s"
        await asyncio.sleep(0.1)
    figures = {"at_start_mib": at_start, "peak_mib": memory_mib(process.pid, "VmHWM")}
    assert deployment.stop(process) == 0
    say(f"{role}: {figures}")
    return figures


async def measure(services: LocalServices, folder: Path) -> dict[str, dict[str, int]]:
    # Windows far longer than the run: all pairs are in flight until capacity, or the end of the backlog, closes them.
    common = {"partitions": PARTITIONS, "session_timeout_seconds": 30, "window_seconds": 3600, "log_format": "json"}
    where = (services.bootstrap_servers, services.database_url, folder)
    default = Deployment(*where, run_id="memory", window_capacity=50_000, **common)
    # The same events a second time, for a group of its own.
    all_pairs = Deployment(*where, run_id="memory", window_capacity=PAIRS, consumer_group="all-pairs", **common)
    large_default = Deployment(*where, run_id="memory-large", **common)
    large_all = Deployment(
        *where, run_id="memory-large", open_windows_bytes=1024**3, consumer_group="large-all", **common
    )
    await default.prepare()
    await large_default.prepare()
    await asyncio.to_thread(produce, default.settings, AGENTS, ROUNDS, small)
    await asyncio.to_thread(produce, large_default.settings, LARGE_AGENTS, 1, large)
    return {
        "worker, default": await run_role(default, "worker"),
        "sink, 10,000,000 rows waiting": await run_role(default, "sink"),
        "worker, all pairs": await run_role(all_pairs, "worker"),
        "worker, values of 2 kB": await run_role(large_default, "worker"),
        "worker, values of 2 kB, up to 1 GiB": await run_role(large_all, "worker"),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, start_services("packages", say=say) as services:
        figures = asyncio.run(measure(services, Path(folder)))
        versions = f"{services.broker}; {services.database}"
    table = Table("process", "at start, MiB", "peak, MiB", title="memory")
    for process, mib in figures.items():
        table.add_row(process, str(mib["at_start_mib"]), str(mib["peak_mib"]))
    Console().print(table)
    summary = {"benchmark": "memory", **conditions(versions), "note": __doc__, "pairs": PAIRS, "figures": figures}
    write("memory", summary)


if __name__ == "__main__":
    sys.exit(main())
