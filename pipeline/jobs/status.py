"""The pipeline's status, from Kafka, Postgres and the roles' own metrics, and whether it is healthy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec
from asyncpg import Connection

from pipeline.core.batch import decode_batch
from pipeline.core.replication import Risk
from pipeline.errors import ANSWER_SECONDS, DecodeError, NewerVersion, ServiceUnavailable
from pipeline.jobs.scrape import highest, open_pairs, outages, scrape
from pipeline.kafka.admin import KafkaAdmin, Offsets
from pipeline.kafka.range_reader import OffsetRange, RangeReader
from pipeline.kafka.topics import TopicFacts, find_risks, require_topics
from pipeline.postgres.epoch import is_over
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.statements import fetch_one, statement
from pipeline.settings import Settings

# The table is counted by a full scan, which must not delay the rest.
_TABLE_SECONDS: Final = 10.0
_SHOWN_STALE: Final = 5
# By what metrics call them.
SERVICES: Final = {"kafka": "Kafka", "postgres": "Postgres", "schema_registry": "the schema registry"}

OffsetsByPartition = Mapping[int, Offsets]


class PartitionStatus(msgspec.Struct):
    """How far worker and sink have got with one partition.

    Units: lags in records, of the events topic and of the batches topic; `*_behind_seconds` is how long the oldest
    unfinished record has waited. `open_pairs` is None if no worker's metrics can be read. `uncommitted` records of the
    events topic wait in Kafka, in or behind a transaction that was begun `uncommitted_seconds` ago. `needs_upgrade`
    says why the next batch can't be read.
    """

    partition: int
    worker_lag: int = 0
    worker_behind_seconds: float = 0.0
    open_pairs: int | None = None
    sink_lag: int = 0
    sink_behind_seconds: float = 0.0
    last_applied_at: datetime | None = None
    needs_upgrade: str | None = None
    uncommitted: int = 0
    uncommitted_seconds: float = 0.0


class StaleAgent(msgspec.Struct):
    """An agent whose newest value is too old; `name` is what it calls itself, if that is no UUID."""

    agent_id: str
    name: str | None
    newest: datetime


class TableStatus(msgspec.Struct):
    """What the table contains; `latest_stale` are the five stale agents that fell silent last."""

    rows: int
    agents: int
    stale_agents: int
    latest_stale: list[StaleAgent] = []


class Status(msgspec.Struct):
    """The whole pipeline at one moment; None for metrics that no role serves, and for a table not counted in time.

    `outage_seconds` has, by service, how long each that is unavailable has been so.
    """

    workers: int
    sinks: int
    partitions: list[PartitionStatus]
    dead_letters: int
    table: TableStatus | None
    outage_seconds: dict[str, float] | None = None
    is_table_emptied: bool = False
    risks: list[Risk] = []
    held_partitions: float | None = None

    def problems(self, *, worker_may_lag_seconds: float, sink_may_lag_seconds: float) -> list[str]:
        """Return one line for each thing that is wrong; none if the pipeline is healthy."""
        problems = []
        if not self.workers:
            problems.append("no worker is in its consumer group: start one (`agent-metadata worker`)")
        if not self.sinks:
            problems.append("no sink is in its consumer group: start one (`agent-metadata sink`)")
        worker = max((partition.worker_behind_seconds for partition in self.partitions), default=0.0)
        if worker > worker_may_lag_seconds:
            problems.append(f"the worker is {worker:.0f} s behind: see its log; more workers share the partitions")
        problems += [
            f"a transaction in partition {partition.partition} of the events topic has been open for "
            f"{partition.uncommitted_seconds:.0f} s, and {partition.uncommitted} records wait for its end: see its "
            f"producer; kafka-transactions.sh finds it and can abort it"
            for partition in self.partitions
            if partition.uncommitted_seconds > worker_may_lag_seconds
        ]
        sink = max((partition.sink_behind_seconds for partition in self.partitions), default=0.0)
        if sink > sink_may_lag_seconds:
            problems.append(f"the sink is {sink:.0f} s behind: see its log, and whether Postgres is slow")
        problems += [
            f"partition {item.partition} waits: {item.needs_upgrade}" for item in self.partitions if item.needs_upgrade
        ]
        if self.held_partitions:
            problems.append(
                f"a sink holds {self.held_partitions:.0f} partitions back, at newer batches: upgrade the sinks"
            )
        problems += [
            f"a role has waited {seconds:.0f} s for {SERVICES.get(service, service)}, which is unavailable or refuses "
            f"what it is sent: see the role's log"
            for service, seconds in (self.outage_seconds or {}).items()
        ]
        if self.is_table_emptied:
            problems.append("the table was emptied: a sink refills it by itself, or `agent-metadata refill` does")
        return problems + [risk.text for risk in self.risks if risk.is_problem]


class LagNow(NamedTuple):
    """The unfinished records of a partition, and how long the oldest of them has waited."""

    records: int
    seconds: float


class _First(NamedTuple):
    """The oldest unfinished record of a partition: how long it has waited, and its value."""

    waited: float
    value: bytes | None


class _Groups(NamedTuple):
    """Offsets, by partition, and group sizes at one moment."""

    events: OffsetsByPartition
    batches: OffsetsByPartition
    dead_letters: OffsetsByPartition
    committed: Mapping[int, int]
    workers: int
    sinks: int


async def gather_status(
    settings: Settings, connection: Connection, *, stale_after_seconds: float, metrics_urls: Sequence[str]
) -> Status:
    """Look at the whole pipeline once; changes nothing and joins no group.

    Raises:
        TopicMismatch, ServiceUnavailable, ConfigError: topics or tables are missing, or a server does not answer.
    """
    topics = await require_topics(settings.client_config(), settings.declared_topics())
    async with translated_errors("reading progress"):
        rows = await connection.fetch(statement("status_progress"), topics["batches"].topic_id)
        epoch = await fetch_one(connection, statement("read_epoch"))
    applied = {row["partition"]: row for row in rows}
    groups = await _ask_kafka(settings, topics)
    worker, _ = await _lags(settings, topics["events"], groups.committed, groups.events)
    next_offsets = {number: row["next_offset"] for number, row in applied.items()}
    sink, first_batches = await _lags(settings, topics["batches"], next_offsets, groups.batches)
    open_for = await _open_for(settings, topics["events"], groups.events)
    samples = await asyncio.to_thread(scrape, metrics_urls)
    risks = await asyncio.to_thread(find_risks, settings.client_config(), settings.declared_topics())
    return Status(
        workers=groups.workers,
        sinks=groups.sinks,
        partitions=[
            PartitionStatus(
                number,
                *worker[number],
                open_pairs(samples, number),
                *sink[number],
                applied[number]["updated_at"] if number in applied else None,
                _why_unreadable(first_batches[number]) if number in first_batches else None,
                groups.events[number].uncommitted,
                open_for[number],
            )
            for number in sorted(groups.events)
        ],
        dead_letters=sum(offsets.stable - offsets.earliest for offsets in groups.dead_letters.values()),
        table=await _table(connection, stale_after_seconds),
        is_table_emptied=is_over(epoch),
        risks=risks,
        outage_seconds=outages(samples),
        held_partitions=highest(samples, "agent_metadata_held_partitions"),
    )


def group_positions(settings: Settings, events: TopicFacts) -> dict[int, int]:
    """Read the worker group's committed offsets in the events topic."""
    with KafkaAdmin(settings.client_config()) as admin:
        return admin.committed(settings.worker_group, events.name, events.partitions, ANSWER_SECONDS)


async def _ask_kafka(settings: Settings, topics: Mapping[str, TopicFacts]) -> _Groups:
    # Positions before ends: records that arrive in between then count as lag, and no lag is negative.
    committed = await asyncio.to_thread(group_positions, settings, topics["events"])
    with KafkaAdmin(settings.client_config()) as admin:
        events, batches, dead_letters = [
            await admin.offsets(topics[role].name, range(topics[role].partitions), ANSWER_SECONDS)
            for role in ("events", "batches", "dead_letter")
        ]
        workers, sinks = [
            await asyncio.to_thread(admin.members, group, ANSWER_SECONDS)
            for group in (settings.worker_group, settings.sink_group)
        ]
    return _Groups(events, batches, dead_letters, committed, workers, sinks)


async def _lags(
    settings: Settings, topic: TopicFacts, positions: Mapping[int, int], ends: OffsetsByPartition
) -> tuple[dict[int, LagNow], Mapping[int, _First]]:
    starts = {number: max(at.earliest, positions.get(number, at.earliest)) for number, at in ends.items()}
    waiting = {number: at for number, at in starts.items() if at < ends[number].stable}
    first = await _first_records(settings.client_config(), topic, waiting)
    lags = {
        number: LagNow(max(0, ends[number].stable - at), first[number].waited if number in first else 0.0)
        for number, at in starts.items()
    }
    return lags, first


async def _open_for(settings: Settings, topic: TopicFacts, offsets: OffsetsByPartition) -> dict[int, float]:
    """Return how many seconds ago the first open transaction of each partition began; 0 where there is none."""
    begins = {number: at.stable for number, at in offsets.items() if at.uncommitted}
    config = {**settings.client_config(), "isolation.level": "read_uncommitted"}
    first = await _first_records(config, topic, begins)
    return {number: first[number].waited if number in first else 0.0 for number in offsets}


async def _first_records(
    config: Mapping[str, Any], topic: TopicFacts, positions: Mapping[int, int]
) -> Mapping[int, _First]:
    """Read the record at each position."""
    if not positions:
        return {}
    async with RangeReader(config, topic.name) as reader:
        return await asyncio.to_thread(_read_first, reader, positions)


def _read_first(reader: RangeReader, positions: Mapping[int, int]) -> dict[int, _First]:
    found = {}
    for number, at in positions.items():
        reader.open(OffsetRange(number, at, at + 1))
        deadline = time.monotonic() + ANSWER_SECONDS
        while not reader.is_done:
            for message in reader.read(1):
                found[number] = _First(max(0.0, time.time() - message.timestamp()[1] / 1000), message.value())
            if time.monotonic() > deadline:
                raise ServiceUnavailable(f"Kafka did not send a record of {reader.topic} within {ANSWER_SECONDS:g} s")
    return found


def _why_unreadable(first: _First) -> str | None:
    """Say why a sink like this program holds the batch back; None if it doesn't."""
    try:
        decode_batch(first.value)
    except NewerVersion as newer:
        return str(newer)
    except DecodeError:
        pass
    return None


async def _table(connection: Connection, stale_after_seconds: float) -> TableStatus | None:
    async with translated_errors("counting rows"):
        try:
            row = await fetch_one(
                connection, statement("status_table"), stale_after_seconds, _SHOWN_STALE, timeout_seconds=_TABLE_SECONDS
            )
        except TimeoutError:
            return None
    latest = msgspec.json.decode(row["latest_stale"], type=list[StaleAgent])
    return TableStatus(row["rows"], row["agents"], row["stale_agents"], latest)
