"""Wire the operator's jobs from settings: replay, refill."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog

from pipeline.clock import SystemClock
from pipeline.core.batch import Row
from pipeline.core.report import AgentIds
from pipeline.errors import RowRejected
from pipeline.kafka.chunk_reader import ChunkReader
from pipeline.kafka.credentials import aiokafka_security
from pipeline.kafka.range_reader import OffsetRange, RangeReader
from pipeline.kafka.topics import TopicFacts, require_topics
from pipeline.postgres.store import Store
from pipeline.replay.replay import (
    EVERYTHING,
    BatchesFold,
    EventsFold,
    Filter,
    Fold,
    Pace,
    Replay,
    ReplaySource,
    Summary,
)
from pipeline.settings import Settings

_log = structlog.get_logger(__name__)


def nothing_happened(_: int) -> None:
    """Ignore progress."""


async def find_ranges(
    settings: Settings, topic: TopicFacts, start_ms: int | None = None, end_ms: int | None = None
) -> list[OffsetRange]:
    """Find what arrived in a topic in [start_ms, end_ms); see RangeReader.between."""
    async with RangeReader(settings.client_config(), topic.name) as reader:
        return await asyncio.to_thread(reader.between, range(topic.partitions), start_ms, end_ms)


def chunk_reader(settings: Settings, topic: TopicFacts) -> ChunkReader:
    """Make a reader of a topic for a replay."""
    return ChunkReader(settings.kafka_bootstrap_servers.split(","), aiokafka_security(settings), topic.name)


@contextlib.asynccontextmanager
async def replay_store(settings: Settings, *, notify: bool, connections: int = 1) -> AsyncIterator[Store]:
    """Open a store of its own, so that a replay doesn't take the connections that the live sink needs."""
    store = await Store.connect(
        settings.database_url.get_secret_value(),
        connections=connections,
        undeclared=settings.undeclared,
        notify=notify,
        application_name="agent-metadata-replay",
    )
    try:
        yield store
    finally:
        await store.close()


def wire_replay(
    settings: Settings,
    source: ReplaySource,
    reader: ChunkReader,
    store: Store,
    *,
    only: Filter = EVERYTHING,
    is_dry_run: bool = False,
    rate: float | None = None,
    on_read: Callable[[int], None] = nothing_happened,
) -> Replay:
    """Make a replay of what `reader` reads, in the ranges that `run` is given."""
    agent_ids = AgentIds()

    def new_fold(capacity: int) -> Fold:
        if source == "events":
            return EventsFold(capacity, settings.max_clock_skew, agent_ids)
        return BatchesFold(capacity, agent_ids)

    async def log_refused(row: Row, error: RowRejected) -> Awaitable[None]:
        _log.warning("row_rejected", agent_id=row.agent_id, key=row.key, sqlstate=error.sqlstate)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)  # no dead letter: the topic has it
        return done

    return Replay(
        reader,
        new_fold=new_fold,
        write=store.count_replay if is_dry_run else lambda rows: store.replay(rows, log_refused),
        pace=Pace(rate, SystemClock()),
        only=only,
        on_read=on_read,
    )


async def refill(
    settings: Settings,
    *,
    on_found: Callable[[int], None] = nothing_happened,
    on_read: Callable[[int], None] = nothing_happened,
    on_start: Callable[[Replay], None] = lambda _: None,
) -> Summary | None:
    """Replay all that the batches topic holds, and note that the table is whole; None: another process is at it.

    `on_found(records)` is told how many there are to read, `on_start(replay)` what to stop.

    Raises:
        TopicMismatch, ServiceUnavailable, ConfigError: Kafka or Postgres is away, or refuses us; nothing was noted.
        Interrupted: it was stopped; nothing was noted.
    """
    topic = (await require_topics(settings.client_config(), settings.declared_topics()))["batches"]
    summary = Summary()
    async with (
        # One connection holds the lock, for as long as Postgres does not crash.
        replay_store(settings, notify=settings.notify == "on", connections=2) as store,
        store.refilling() as is_ours,
    ):
        if not is_ours:
            return None
        ranges = await find_ranges(settings, topic)
        on_found(sum(item.end - item.start for item in ranges))
        async with chunk_reader(settings, topic) as reader:
            replay = wire_replay(settings, "batches", reader, store, on_read=on_read)
            on_start(replay)
            await replay.run(ranges, summary, nothing_happened)
    return summary
