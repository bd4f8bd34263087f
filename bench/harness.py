"""What the benchmarks share: topics full of reports, runs in turn, ratios of medians, a table and a JSON file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from rich.console import Console
from rich.table import Table

from pipeline.core.report import Entry, Report, encode_report

RESULTS = Path(__file__).parent / "results"
AGENTS, KEYS = 2000, 10
PARTITIONS = 8
_PACKAGES = ("faust-streaming", "aiokafka", "confluent-kafka", "asyncpg", "msgspec", "uvloop")

say = Console(stderr=True, highlight=False).print


def agent_ids(count: int = AGENTS) -> list[str]:
    return [str(uuid.uuid5(uuid.NAMESPACE_OID, str(number))) for number in range(count)]


def create_topic(servers: str, name: str, partitions: int = PARTITIONS) -> None:
    admin = AdminClient({"bootstrap.servers": servers})
    topic = NewTopic(name, partitions, 1, config={"message.timestamp.type": "LogAppendTime"})
    admin.create_topics([topic])[name].result()


def fill_events(
    servers: str,
    topic: str,
    *,
    entries: int,
    entries_a_report: int,
    encode: Callable[[Report], bytes] = encode_report,
) -> dict[tuple[str, str], Any]:
    """Produce reports of 2,000 agents x 10 keys in turn; return the newest (value, collected_at) of each pair."""
    create_topic(servers, topic)
    producer = Producer(
        {
            "bootstrap.servers": servers,
            "compression.type": "lz4",
            "linger.ms": 50,
            "partitioner": "murmur2",
            "queue.buffering.max.messages": 2_000_000,
            "queue.buffering.max.kbytes": 1_000_000,
        }
    )
    ids = agent_ids()
    newest: dict[tuple[str, str], Any] = {}
    for number in range(entries // entries_a_report):
        agent_id, turn = ids[number % AGENTS], number // AGENTS
        now = datetime.now(UTC)
        made = [
            Entry(f"key{(turn * entries_a_report + index) % KEYS:02}", f"value {number} {index}")
            for index in range(entries_a_report)
        ]
        for entry in made:
            newest[agent_id, entry.key] = (entry.value, now)
        producer.produce(topic, encode(Report(agent_id, made, now)), agent_id)
        if number % 10_000 == 0:
            producer.poll(0)
    producer.flush()
    return newest


def run_side(module: str, side: str, **options: Any) -> dict[str, Any]:
    """Run one side in a fresh process; it prints its figures as one JSON line."""
    command = [sys.executable, "-m", module, side, json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def in_turn(sides: Mapping[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Run all sides once, then all again: if the machine gets slower, it does so for all."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(runs):
        for name, side in sides.items():
            figures[name].append(side())
            say(f"run {number + 1}/{runs} {name}: {figures[name][-1]:,.0f}")
    return figures


def ratio(figures: Mapping[str, list[float]], ours: str, other: str) -> float:
    return round(statistics.median(figures[ours]) / statistics.median(figures[other]), 2)


def report(
    name: str, *, unit: str, services: str, figures: Mapping[str, list[float]], ratios: Mapping[str, float], note: str
) -> None:
    table = Table("side", "min", "median", "max", title=f"{name}, {unit}")
    for side, values in figures.items():
        table.add_row(side, *(f"{pick(values):,.0f}" for pick in (min, statistics.median, max)))
    Console().print(table)
    Console().print_json(json.dumps({"ratios": ratios}))
    summary = {
        "benchmark": name,
        "unit": unit,
        **conditions(services),
        "note": note,
        "figures": {
            side: {
                "min": round(min(values)),
                "median": round(statistics.median(values)),
                "max": round(max(values)),
                "runs": [round(value) for value in values],
            }
            for side, values in figures.items()
        },
        "ratios": dict(ratios),
    }
    write(name, summary)


def conditions(services: str, packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "processor": _processor(), "memory_gib": _memory_gib()},
        "versions": {
            "python": platform.python_version(),
            "services": services,
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def write(name: str, summary: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
