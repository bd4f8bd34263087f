"""Wire the operator's jobs from settings: replay, refill."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import structlog

from pipeline.batch import Row
from pipeline.clock import SystemClock
from pipeline.errors import RowRejected
from pipeline.range_reader import RangeReader
from pipeline.replay import EVERYTHING, BatchesFold, EventsFold, Filter, Fold, Pace, Replay, ReplaySource
from pipeline.settings import Settings
from pipeline.store import Store
from pipeline.topic_admin import TopicFacts, load_topic_specs, require_topics

_ANSWER_SECONDS: Final = 10.0

_log = structlog.get_logger(__name__)


async def require_all_topics(settings: Settings) -> dict[str, TopicFacts]:
    """Return what the topics are, by role.

    Raises:
        TopicMismatch, ServiceUnavailable: one is missing, or Kafka does not answer.
    """
    specs = load_topic_specs(names=settings.topic_names, partitions=settings.partitions)
    return await asyncio.to_thread(require_topics, settings.client_config(), specs, timeout_s=_ANSWER_SECONDS)


def nothing_happened(_: int) -> None:
    """Ignore progress."""


@contextlib.asynccontextmanager
async def range_reader(settings: Settings, topic: TopicFacts) -> AsyncIterator[RangeReader]:
    """Make a reader of a topic; it is closed with the block, off the event loop."""
    reader = RangeReader(settings.client_config(), topic.name)
    try:
        yield reader
    finally:
        await asyncio.to_thread(reader.close)


@contextlib.asynccontextmanager
async def replay_store(settings: Settings, *, notify: bool) -> AsyncIterator[Store]:
    """Open a store of one connection, so that a replay doesn't take what the live sink needs."""
    store = await Store.connect(
        settings.database_url.get_secret_value(),
        connections=1,
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
    reader: RangeReader,
    store: Store,
    *,
    only: Filter = EVERYTHING,
    is_dry_run: bool = False,
    rate: float | None = None,
    on_read: Callable[[int], None] = nothing_happened,
) -> Replay:
    """Make a replay of what `reader` reads, in the ranges that `run` is given."""
    known: dict[str, str] = {}

    def new_fold(capacity: int) -> Fold:
        if source == "events":
            return EventsFold(capacity, settings.max_clock_skew, known)
        return BatchesFold(capacity, known)

    async def log_refused(row: Row, error: RowRejected) -> Awaitable[None]:
        _log.warning("row_rejected", agent_id=row.agent_id, key=row.key, sqlstate=error.sqlstate)
        return asyncio.sleep(0)  # no dead letter: the topic has it

    return Replay(
        reader,
        new_fold=new_fold,
        write=store.count_replay if is_dry_run else lambda rows: store.replay(rows, log_refused),
        pace=Pace(rate, SystemClock()),
        only=only,
        on_read=on_read,
    )
