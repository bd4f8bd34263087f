"""Look a pair up on its whole way: events topic, batches topic, dead letters, table."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, Final

from confluent_kafka import Message

from pipeline.core.batch import decode_batch
from pipeline.core.dead_letter import source_text
from pipeline.core.report import BACKSLASH, moment_from_us, timestamp_us
from pipeline.core.window import OpenWindow
from pipeline.errors import DecodeError
from pipeline.jobs.status import group_positions
from pipeline.jobs.why import Carrier, Event, Found, HeldRow
from pipeline.kafka.range_reader import OffsetRange, RangeReader
from pipeline.kafka.records import as_record, dead_letter_of
from pipeline.kafka.topics import TopicFacts, require_topics
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.store import statement
from pipeline.settings import Settings

# The search goes back from a partition's end in blocks that grow: a live agent's newest report is in the first.
_FIRST_BLOCK_RECORDS: Final = 10_000
_BLOCK_GROWTH: Final = 4


async def trace(
    settings: Settings, connection: Any, agent_id: str, key: str, *, on_searched: Callable[[int], None]
) -> Found:
    """Find the newest event of a pair and what became of it; `on_searched(records)` is told of the search's progress.

    Guarantee: all partitions are searched, so a report is found whatever its record key. Newest is by collected_at
    among the block of records in which the pair shows up first, from the topic's end.

    Raises:
        TopicMismatch, ServiceUnavailable, ConfigError: topics are missing, or a server does not answer.
    """
    topics = await require_topics(settings.client_config(), settings.declared_topics())
    found = Found(agent_id, key, is_ignoring_undeclared=settings.undeclared == "ignore")
    async with RangeReader(settings.client_config(), topics["events"].name) as reader:
        search = _Search(agent_id, key, settings.max_clock_skew)
        found.event = await asyncio.to_thread(_newest_event, reader, topics["events"], search, on_searched)
    if found.event is not None:
        number = found.event.partition
        committed = await asyncio.to_thread(group_positions, settings, topics["events"])
        found.committed = committed.get(number, 0)
        async with RangeReader(settings.client_config(), topics["batches"].name) as reader:
            found.batch = await asyncio.to_thread(_carrier, reader, topics["events"], found)
        async with RangeReader(settings.client_config(), topics["dead_letter"].name) as reader:
            found.dead_letter = await asyncio.to_thread(_dead_letter, reader, topics, found, search)
    # Last, so that what was on its way meanwhile is seen where it arrived.
    async with translated_errors("reading the row"):
        progress = await connection.fetch(statement("status_progress"), topics["batches"].topic_id)
        row = await connection.fetchrow(statement("read_row"), uuid.UUID(agent_id), key)
    found.row = HeldRow(*row) if row else None
    if found.event is not None:
        found.applied = next((row["next_offset"] for row in progress if row["partition"] == found.event.partition), 0)
    return found


class _Search:
    """Tells what a record of reports says of one pair."""

    def __init__(self, agent_id: str, key: str, max_clock_skew: timedelta) -> None:
        self._agent_id = agent_id
        self._key = key
        self._max_clock_skew = max_clock_skew
        self._hex = agent_id.replace("-", "").encode()

    def look(self, message: Message) -> Event | None:
        """Return the pair's entry as the worker folds it, or why it refuses the record; None: of another pair."""
        raw = message.value() or b""
        # Most records are others': a UUID's digits are there in any spelling, unless they are escaped.
        if self._hex not in raw.lower().replace(b"-", b"") and BACKSLASH not in raw:
            return None
        window = OpenWindow(0.0, capacity=2**31, max_clock_skew=self._max_clock_skew)
        window.fold([as_record(message)])
        event = Event(message.partition(), message.offset(), _appended_at(message))
        held = window.get(self._agent_id, self._key)
        if held is not None:
            event.collected_at = moment_from_us(timestamp_us(held[0]))
            event.value, event.error = held[1].value, held[1].error
            return event
        if window.rejected and self._hex in raw.lower().replace(b"-", b""):
            event.refused = window.rejected[0].reason
            return event
        return None


def _newest_event(
    reader: RangeReader, topic: TopicFacts, search: _Search, on_searched: Callable[[int], None]
) -> Event | None:
    ends = {item.partition: item for item in reader.between(range(topic.partitions), None, None)}
    block, refused = _FIRST_BLOCK_RECORDS, None
    while ends:
        newest: Event | None = None
        for number, item in list(ends.items()):
            start = max(item.start, item.end - block)
            for message in reader.records(OffsetRange(number, start, item.end), on_searched):
                event = search.look(message)
                if event is None:
                    continue
                if event.refused is not None:
                    refused = event if refused is None or refused.appended_at <= event.appended_at else refused
                elif newest is None or _time(newest) <= _time(event):
                    newest = event
            if start == item.start:
                del ends[number]
            else:
                ends[number] = OffsetRange(number, item.start, start)
        if newest is not None:
            return newest
        block *= _BLOCK_GROWTH
    return refused


def _time(event: Event) -> datetime:
    assert event.collected_at is not None
    return event.collected_at


def _carrier(reader: RangeReader, events: TopicFacts, found: Found) -> Carrier | None:
    event = found.event
    if event is None or event.refused is not None:
        return None
    for message in _since(reader, event.partition, event.appended_at):
        try:
            batch = decode_batch(message.value())
        except DecodeError:
            continue
        source = batch.source
        if (source.topic_id, source.partition) != (events.topic_id, event.partition):
            continue
        pairs = zip(batch.agent_ids, batch.keys, strict=True)
        if source.first <= event.offset <= source.last and (found.agent_id, found.key) in pairs:
            closed_at = moment_from_us(batch.window.end_us)
            return Carrier(event.partition, message.offset(), batch.part, batch.parts, batch.reason, closed_at)
    return None


def _dead_letter(reader: RangeReader, topics: dict[str, TopicFacts], found: Found, search: _Search) -> str | None:
    """Return the reason in a dead letter of this record (by the worker), or of this row (by the sink)."""
    event = found.event
    if event is None:
        return None
    source = source_text(topics["events"].name, event.partition, event.offset)
    for number in range(topics["dead_letter"].partitions):
        for message in _since(reader, number, event.appended_at):
            letter = dead_letter_of(message)
            held = search.look(message)
            if letter.source == source or (
                held is not None and letter.stage == "sink" and held.collected_at == event.collected_at
            ):
                return letter.failure_headers.get("exception.message", "")
    return None


def _since(reader: RangeReader, partition: int, moment: datetime) -> Iterator[Message]:
    for wanted in reader.between([partition], round(moment.timestamp() * 1000), None):
        yield from reader.records(wanted)


def _appended_at(message: Message) -> datetime:
    return moment_from_us(message.timestamp()[1] * 1000)
