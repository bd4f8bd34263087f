"""Worker, sink and the others as processes of their own, on topics and tables of one test."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import asyncpg

from pipeline.kafka.topics import create_topics
from pipeline.postgres.migrations import migrate
from pipeline.producer import MetadataProducer
from pipeline.settings import Settings

DEADLINE_SECONDS = 60.0
# What each command says of a topic that is not there.
NONESUCH_MISSING = (
    "agent-metadata: the cluster lacks nonesuch, or hides it from a user without DESCRIBE: "
    "run `agent-metadata topics create`"
)


async def eventually(what: str, holds: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """Wait for something that no event tells of; return what `holds` gave once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        result = holds()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return result
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


def ask(port: int, path: str) -> tuple[int, str]:
    """GET a path of a role's own port; return status and body, (0, "") where nobody answers."""
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


class Deployment:
    """One pipeline of a test: its settings, its processes, its table."""

    def __init__(self, bootstrap_servers: str, database_url: str, logs: Path, **settings: Any) -> None:
        self.run_id = uuid.uuid4().hex[:8]
        self.environment = {
            "KAFKA_BOOTSTRAP_SERVERS": bootstrap_servers,
            "DATABASE_URL": database_url,
            "AGENT_METADATA_EVENTS_TOPIC": f"events.{self.run_id}",
            "AGENT_METADATA_BATCHES_TOPIC": f"batches.{self.run_id}",
            "AGENT_METADATA_DEAD_LETTER_TOPIC": f"dead-letter.{self.run_id}",
            "AGENT_METADATA_CONSUMER_GROUP": self.run_id,
            "AGENT_METADATA_PARTITIONS": "4",
            "AGENT_METADATA_WINDOW_SECONDS": "0.5",
            "AGENT_METADATA_SESSION_TIMEOUT_SECONDS": "3",
            "AGENT_METADATA_LOG_FORMAT": "json",
            **{f"AGENT_METADATA_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.settings = Settings(
            **{name.removeprefix("AGENT_METADATA_").lower(): value for name, value in self.environment.items()}
        )
        self._database_url = database_url
        self._logs = logs
        self._processes: list[subprocess.Popen[Any]] = []

    async def prepare(self, topic_configs: Mapping[str, dict[str, str]] = MappingProxyType({})) -> None:
        specs = self.settings.declared_topics()
        for role, config in topic_configs.items():
            specs[role] = dataclasses.replace(specs[role], config={**specs[role].config, **config})
        create_topics(self.settings.client_config(), specs)
        async with self.connection() as connection:
            await migrate(connection)

    def start(self, *arguments: str, module: Sequence[str] = ("pipeline",)) -> subprocess.Popen[bytes]:
        """Start `python -m module arguments`; its stdout and stderr go to files named after the first argument."""
        log_path = self._logs / f"{arguments[0]}-{self.run_id}-{len(self._processes)}.log"
        output_path = log_path.with_suffix(".out")
        with log_path.open("wb") as log, output_path.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *module, *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
            )
        process.role = arguments[0]  # type: ignore[attr-defined]
        process.log_path = log_path  # type: ignore[attr-defined]
        process.output_path = output_path  # type: ignore[attr-defined]
        self._processes.append(process)
        return process

    def start_command(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command whose output the test reads; it ends with the test in any case."""
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    async def started(self, role: str) -> subprocess.Popen[bytes]:
        """Start a role and wait until it owns its partitions."""
        process = self.start(role)
        await eventually(f"{role} owns partitions", lambda: self.logged(process, "partitions_assigned"))
        return process

    def logged(self, process: subprocess.Popen[bytes], event: str) -> list[dict[str, Any]]:
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {self.log(process)[-3000:]}")
        lines = (line for line in self.log(process).splitlines() if line.startswith("{"))
        return [entry for entry in map(json.loads, lines) if entry.get("event") == event]

    def log(self, process: subprocess.Popen[bytes]) -> str:
        path: Path = process.log_path  # type: ignore[attr-defined]
        return path.read_text(encoding="utf-8")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        process.send_signal(signal.SIGTERM)
        return process.wait(30)

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def producer(self) -> MetadataProducer:
        return MetadataProducer(self.settings.client_config(), topic=self.settings.events_topic)

    def connection(self) -> Any:
        return _Connected(self._database_url)

    async def table(self) -> dict[tuple[str, str], tuple[str, str, datetime]]:
        async with self.connection() as connection:
            rows = await connection.fetch(
                "select workspace_agent_id, key, value, error, collected_at from workspace_agent_metadata"
            )
        return {(str(row[0]), row[1]): (row[2], row[3], row[4]) for row in rows}

    async def wait_for(self, expected: dict[tuple[str, str], Any], seconds: float = DEADLINE_SECONDS) -> None:
        """Wait until the table holds these rows and no others."""
        try:
            await eventually("the table is right", lambda: self._is_right(expected), seconds)
        except AssertionError:
            held = await self.table()
            wrong = {pair: (held.get(pair), want) for pair, want in expected.items() if held.get(pair) != want}
            unexpected = sorted(held.keys() - expected.keys())[:5]
            raise AssertionError(f"{len(wrong)} rows wrong: {list(wrong.items())[:5]}; {unexpected=}") from None

    async def _is_right(self, expected: dict[tuple[str, str], Any]) -> bool:
        return await self.table() == expected


class _Connected:
    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Any:
        self._connection = await asyncpg.connect(self._url)
        return self._connection

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()


def consume_all(settings: Settings, topic: str) -> list[Any]:
    """Read a whole topic as it is now."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": settings.kafka_bootstrap_servers, "group.id": "reader"})
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        positions = [TopicPartition(topic, number, 0) for number in partitions]
        ends = {number: consumer.get_watermark_offsets(TopicPartition(topic, number))[1] for number in partitions}
        consumer.assign(positions)
        messages: list[Any] = []
        while len(messages) < sum(ends.values()):
            messages += [message for message in consumer.consume(1000, 1.0) if message.error() is None]
        return messages
    finally:
        consumer.close()


def flatten(batches: Iterable[Any]) -> list[Any]:
    return [row for batch in batches for row in batch.columns.rows()]
