"""What a plain program does: confluent_kafka.consume, msgspec, a dict, and nothing else."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import msgspec
from confluent_kafka import Consumer

Newest = dict[tuple[str, str], tuple[Any, str, str]]


class Entry(msgspec.Struct, gc=False):
    key: str
    value: str = ""
    error: str = ""


class Report(msgspec.Struct, gc=False):
    agent_id: str
    entries: list[Entry]
    collected_at: datetime | None = None


decode = msgspec.json.Decoder(Report).decode


def assigned_consumer(servers: str, topic: str) -> tuple[Consumer, list[float]]:
    """Return a consumer of a fresh group, and a list that gets the time of its assignment."""
    started: list[float] = []
    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": f"plain-{uuid.uuid4().hex[:8]}",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            # By default librdkafka pauses for a second whenever 100,000 messages wait, which halves its rate here.
            "queued.min.messages": 1_000_000,
        }
    )
    consumer.subscribe([topic], on_assign=lambda *_: started.append(time.perf_counter()))
    return consumer, started


def fold(messages: Sequence[Any], newest: Newest, decode: Callable[[bytes], Any] = decode) -> int:
    """Keep the latest of each pair; return how many entries there were."""
    count = 0
    for message in messages:
        report = decode(message.value())
        agent_id, collected_at = report.agent_id, report.collected_at
        for entry in report.entries:
            count += 1
            pair = (agent_id, entry.key)
            before = newest.get(pair)
            if before is None or collected_at >= before[0]:
                newest[pair] = (collected_at, entry.value, entry.error)
    return count
