"""Look a pair up everywhere on its way: events topic, batches topic, dead letters, table."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Final

from asyncpg import Connection
from confluent_kafka import Message

from pipeline.core.batch import decode_batch
from pipeline.core.dead_letter import source_text
from pipeline.core.decoding import fold_loading
from pipeline.core.report import BACKSLASH, moment_from_us, timestamp_us
from pipeline.core.window import UNLIMITED, OpenWindow
from pipeline.errors import ANSWER_SECONDS, DecodeError, NewerVersion
from pipeline.formats.decoder import decoders
from pipeline.jobs.status import group_positions
from pipeline.jobs.why import Carrier, Event, TableRow, Trace
from pipeline.kafka.admin import KafkaAdmin
from pipeline.kafka.range_reader import OffsetRange, RangeReader
from pipeline.kafka.records import as_record, dead_letter_of
from pipeline.kafka.topics import TopicFacts, require_topics
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.statements import statement
from pipeline.settings import Settings

# The search goes back from a partition's end in growing blocks: a live agent's newest report is in the first.
_FIRST_BLOCK_RECORDS: Final = 10_000
_BLOCK_GROWTH: Final = 4


async def trace(
    settings: Settings,
    connection: Connection,
    agent_id: str,
    key: str,
    *,
    name: str | None = None,
    on_searched: Callable[[int], None],
) -> Trace:
    """Find the newest event of a pair and what became of it; `on_searched(records)` reports how many more were read.

    `name` is what the agent calls itself, if not by its UUID.

    Guarantee: all partitions are searched, so a report is found whatever its record key. Newest is by collected_at
    within the block of records where the pair first turns up, going back from the topic's end.

    Raises:
        TopicMismatch, ServiceUnavailable, ConfigError: topics are missing, or a server does not answer.
        NewerVersion: the event's batch was not found among those that this program can read, and there are others.
    """
    config = settings.client_config()
    topics = await require_topics(config, settings.declared_topics())
    events, batches = topics["events"], topics["batches"]
    result = Trace(agent_id, key, name, is_ignoring_undeclared=settings.undeclared == "ignore")
    search = _Search(agent_id, key, settings, name)
    with KafkaAdmin(config) as admin:
        offsets = await admin.offsets(events.name, range(events.partitions), ANSWER_SECONDS)
    result.uncommitted = sum(partition.uncommitted for partition in offsets.values())
    async with RangeReader(config, events.name) as reader:
        event = result.event = await asyncio.to_thread(_newest_event, reader, events, search, on_searched)
    if event is not None:
        committed = await asyncio.to_thread(group_positions, settings, events)
        result.committed = committed.get(event.partition, 0)
        if event.refused is None:
            async with RangeReader(config, batches.name) as reader:
                result.batch = await asyncio.to_thread(_carrier, reader, events.topic_id, (agent_id, key), event)
        async with RangeReader(config, topics["dead_letter"].name) as reader:
            partitions = range(topics["dead_letter"].partitions)
            source = source_text(events.name, event.partition, event.offset)
            result.dead_letter = await asyncio.to_thread(_dead_letter, reader, partitions, source, event, search)
    # Last, so that what moved on in the meantime is seen where it arrived.
    async with translated_errors("reading the row"):
        progress = await connection.fetch(statement("status_progress"), batches.topic_id)
        row = await connection.fetchrow(statement("read_row"), uuid.UUID(agent_id), key)
    result.row = TableRow(*row) if row else None
    if event is not None:
        result.applied = next((row["next_offset"] for row in progress if row["partition"] == event.partition), 0)
    return result


class _Search:
    """Recognises the records with reports of one pair."""

    def __init__(self, agent_id: str, key: str, settings: Settings, name: str | None) -> None:
        self._agent_id = agent_id
        self._key = key
        self._max_clock_skew = settings.max_clock_skew
        self._decoder = decoders(settings)()
        # What a report of this agent in our own JSON holds. A UUID's digits are the same in any spelling.
        self._hex = agent_id.replace("-", "").encode()
        self._name = name.encode() if name is not None else None

    def event(self, message: Message) -> Event | None:
        """Return the pair's entry as the worker folds it, or why the worker refuses the record; None: another pair."""
        raw = message.value() or b""
        # Most records belong to others. Text may be escaped, and other formats are decoded to be sure.
        is_named = self._hex in raw.lower().replace(b"-", b"") or (self._name is not None and self._name in raw)
        if not is_named and BACKSLASH not in raw and self._decoder.is_own_json(raw):
            return None
        window = OpenWindow(0.0, capacity=UNLIMITED, max_clock_skew=self._max_clock_skew, decoder=self._decoder)
        fold_loading(window, self._decoder, [as_record(message)])
        event = Event(message.partition(), message.offset(), _appended_at(message))
        latest = window.get(self._agent_id, self._key)
        if latest is not None:
            collected_at, entry = latest
            event.collected_at = moment_from_us(timestamp_us(collected_at))
            event.value, event.error = entry.value, entry.error
            return event
        if window.rejected and is_named:
            event.refused = window.rejected[0].reason
            return event
        return None


def _newest_event(
    reader: RangeReader, topic: TopicFacts, search: _Search, on_searched: Callable[[int], None]
) -> Event | None:
    unread = {offsets.partition: offsets for offsets in reader.between(range(topic.partitions), None, None)}
    block = _FIRST_BLOCK_RECORDS
    newest_refused: Event | None = None
    while unread:
        newest: Event | None = None
        for partition, offsets in list(unread.items()):
            start = max(offsets.start, offsets.end - block)
            for message in reader.records(OffsetRange(partition, start, offsets.end), on_searched):
                event = search.event(message)
                if event is None:
                    continue
                if event.refused is not None:
                    if newest_refused is None or newest_refused.appended_at <= event.appended_at:
                        newest_refused = event
                elif newest is None or _time(newest) <= _time(event):
                    newest = event
            if start == offsets.start:
                del unread[partition]
            else:
                unread[partition] = OffsetRange(partition, offsets.start, start)
        if newest is not None:
            return newest
        block *= _BLOCK_GROWTH
    return newest_refused


def _time(event: Event) -> datetime:
    assert event.collected_at is not None
    return event.collected_at


def _carrier(reader: RangeReader, events_topic_id: str, pair: tuple[str, str], event: Event) -> Carrier | None:
    newer: NewerVersion | None = None
    for message in _since(reader, event.partition, event.appended_at):
        try:
            batch = decode_batch(message.value())
        except NewerVersion as error:
            newer = newer or error
            continue
        except DecodeError:
            continue
        source = batch.source
        if (source.topic_id, source.partition) != (events_topic_id, event.partition):
            continue
        if source.first <= event.offset <= source.last and pair in zip(batch.agent_ids, batch.keys, strict=True):
            closed_at = moment_from_us(batch.window.end_us)
            return Carrier(event.partition, message.offset(), batch.part, batch.parts, batch.reason, closed_at)
    if newer is not None:
        raise newer  # it may be the one
    return None


def _dead_letter(reader: RangeReader, partitions: range, source: str, event: Event, search: _Search) -> str | None:
    """Return the reason in a dead letter of the event's record (by the worker), or of its row (by the sink)."""
    for partition in partitions:
        for message in _since(reader, partition, event.appended_at):
            letter = dead_letter_of(message)
            if letter.source == source or (letter.stage == "sink" and _is_same_time(search.event(message), event)):
                return letter.reason
    return None


def _is_same_time(other: Event | None, event: Event) -> bool:
    return other is not None and other.collected_at == event.collected_at


def _since(reader: RangeReader, partition: int, moment: datetime) -> Iterator[Message]:
    for offsets in reader.between([partition], max(0, round(moment.timestamp() * 1000)), None):
        yield from reader.records(offsets)


def _appended_at(message: Message) -> datetime:
    return moment_from_us(message.timestamp()[1] * 1000)
