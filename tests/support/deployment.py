"""A private pipeline of one test, and what tests wait for and read."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.local.deployment import Deployment as LocalDeployment
from pipeline.local.deployment import ask as ask
from pipeline.producer import MetadataProducer
from pipeline.settings import Settings

DEADLINE_SECONDS = 60.0
# What each command says of a topic that does not exist.
NONESUCH_MISSING = (
    "agent-metadata: the cluster lacks nonesuch, or hides it from a user without DESCRIBE: "
    "run `agent-metadata topics create`"
)


async def eventually(what: str, holds: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """Wait for a condition that no event announces; return what `holds` returned once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        result = holds()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return result
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


class Deployment(LocalDeployment):
    """One pipeline of a test: short windows, few partitions, logs in JSON."""

    def __init__(self, bootstrap_servers: str, database_url: str, folder: Path, **settings: Any) -> None:
        defaults = {"partitions": 4, "window_seconds": 0.5, "session_timeout_seconds": 3, "log_format": "json"}
        super().__init__(bootstrap_servers, database_url, folder, **{**defaults, **settings})

    async def prepare(self, topic_configs: Mapping[str, dict[str, str]] = MappingProxyType({})) -> None:
        for role, config in topic_configs.items():
            declared = self.topics[role]
            self.topics[role] = dataclasses.replace(declared, config={**declared.config, **config})
        await super().prepare()

    def start_command(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command whose output the test reads; it ends with the test in any case."""
        process = subprocess.Popen(
            self.command(*arguments),
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    async def run(self, *arguments: str, seconds: float = DEADLINE_SECONDS) -> tuple[int, str, str]:
        """Run a command to its end; return (exit code, stdout, stderr)."""
        process = self.start_command(*arguments)
        out, err = await asyncio.to_thread(process.communicate, timeout=seconds)
        return process.returncode, out, err

    def producer(self) -> MetadataProducer:
        return MetadataProducer(self.settings.client_config(), topic=self.settings.events_topic)

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
