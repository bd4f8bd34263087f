"""Wire a replay from settings; refill an emptied table."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import structlog

from pipeline.clock import SystemClock
from pipeline.core.batch import Row
from pipeline.core.report import AgentIds
from pipeline.errors import RowRejected
from pipeline.formats.decoder import decoders
from pipeline.kafka.chunk_reader import ChunkReader
from pipeline.kafka.credentials import aiokafka_security
from pipeline.kafka.range_reader import OffsetRange, RangeReader
from pipeline.kafka.topics import TopicFacts, require_topics
from pipeline.postgres.store import Store
from pipeline.replay.folds import BatchesFold, EventsFold, Fold, ReplaySource
from pipeline.replay.pace import Pace
from pipeline.replay.replay import EVERYTHING, PairFilter, Replay, Summary
from pipeline.settings import Settings

_log = structlog.get_logger(__name__)


async def find_ranges(
    settings: Settings, topic: TopicFacts, start_ms: int | None = None, end_ms: int | None = None
) -> list[OffsetRange]:
    """Find what was appended to a topic in [start_ms, end_ms); see RangeReader.between."""
    async with RangeReader(settings.client_config(), topic.name) as reader:
        return await asyncio.to_thread(reader.between, range(topic.partitions), start_ms, end_ms)


def chunk_reader(settings: Settings, topic: TopicFacts) -> ChunkReader:
    """Make a reader of a topic for a replay."""
    return ChunkReader(settings.kafka_bootstrap_servers.split(","), aiokafka_security(settings), topic.name)


@contextlib.asynccontextmanager
async def replay_store(settings: Settings, *, notify: bool, connections: int = 1) -> AsyncIterator[Store]:
    """Open a store for a replay alone, so that it doesn't take connections from the live sink."""
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
    only: PairFilter = EVERYTHING,
    is_dry_run: bool = False,
    rate: float | None = None,
    on_read: Callable[[int], None] = lambda _: None,
) -> Replay:
    """Make a replay of the topic that `reader` reads; `rate` is in records, or rows, per second."""
    return Replay(
        reader,
        new_fold=_folds(settings, source),
        write=(lambda rows, _: store.count_replay(rows))
        if is_dry_run
        else lambda rows, names: store.replay(rows, names, _log_refused),
        pace=Pace(rate, SystemClock()),
        only=only,
        on_read=on_read,
    )


def _folds(settings: Settings, source: ReplaySource) -> Callable[[int], Fold]:
    if source == "events":
        return partial(EventsFold, max_clock_skew=settings.max_clock_skew, decoder=decoders(settings)())
    return partial(BatchesFold, agent_ids=AgentIds(uuids_only=True))


async def _log_refused(row: Row, error: RowRejected) -> Awaitable[None]:
    """Log a row that Postgres refuses; it needs no dead letter, as it is still in the topic."""
    _log.warning("row_rejected", agent_id=row.agent_id, key=row.key, sqlstate=error.sqlstate)
    acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    acknowledged.set_result(None)
    return acknowledged


async def refill(
    settings: Settings,
    *,
    on_found: Callable[[int], None] = lambda _: None,
    on_read: Callable[[int], None] = lambda _: None,
    on_start: Callable[[Replay], None] = lambda _: None,
) -> Summary | None:
    """Replay the whole batches topic, then record that the table is whole; None: another process is refilling it.

    `on_found(records)` gets the number of records to read, `on_read(records)` how many more were read, and
    `on_start(replay)` the replay, so that the caller can stop it.

    Raises:
        TopicMismatch, ServiceUnavailable, ConfigError: Kafka or Postgres is down, or refuses access; the table still
            counts as emptied.
        Interrupted: the replay was stopped; likewise.
    """
    topic = (await require_topics(settings.client_config(), settings.declared_topics()))["batches"]
    summary = Summary()
    async with (
        # One of the connections holds the lock until the block ends, or Postgres crashes.
        replay_store(settings, notify=settings.notify == "on", connections=2) as store,
        store.epoch.refilling() as is_ours,
    ):
        if not is_ours:
            return None
        ranges = await find_ranges(settings, topic)
        on_found(sum(offsets.length for offsets in ranges))
        async with chunk_reader(settings, topic) as reader:
            replay = wire_replay(settings, "batches", reader, store, on_read=on_read)
            on_start(replay)
            await replay.run(ranges, summary)
    return summary
