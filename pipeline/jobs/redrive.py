"""List the dead letters and give them another try: what the commands `dead-letter ...` do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Final, NamedTuple

from pipeline.core.dead_letter import REDRIVES_HEADER, DeadLetter, restore
from pipeline.core.report import Report, encode_report
from pipeline.errors import DecodeError, PipelineError, TopicMismatch
from pipeline.kafka.admin import KafkaAdmin
from pipeline.kafka.publisher import Publisher
from pipeline.kafka.range_reader import RangeReader
from pipeline.kafka.records import dead_letter_of
from pipeline.settings import Settings

# Reports under way to Kafka at once.
_MOST_UNACKNOWLEDGED: Final = 1000
_ANSWER_SECONDS: Final = 10.0
_FLUSH_SECONDS: Final = 15.0

Progress = Callable[[int, int], None]


class Filter(NamedTuple):
    """Which dead letters are meant; None is any.

    `reason` is a part of the reason, in any case; `offset` is (partition, offset) of the dead-letter topic.
    """

    agent: str | None = None
    stage: str | None = None
    reason: str | None = None
    offset: tuple[int, int] | None = None

    def matches(self, letter: DeadLetter) -> bool:
        """Tell whether a dead letter is meant."""
        return (
            (self.agent is None or letter.agent.lower() == self.agent.lower())
            and (self.stage is None or letter.stage == self.stage)
            and (self.reason is None or self.reason.lower() in letter.reason.lower())
            and (self.offset is None or self.offset == (letter.partition, letter.offset))
        )


class Redriven(NamedTuple):
    """What a redrive did, in dead letters: `matched` is the sum of the others.

    `refused`: would be refused again; `duplicates`: another one that says the same was sent; `came_back`: redriven
    too often already.
    """

    matched: int
    redriven: int
    refused: int
    duplicates: int
    came_back: int


def dead_letters(
    settings: Settings, chosen: Filter, *, on_progress: Progress = lambda _done, _total: None
) -> Iterator[DeadLetter]:
    """Iterate what the dead-letter topic holds now, the oldest first.

    Raises:
        TopicMismatch, ServiceUnavailable: the topic can't be read.
    """
    topic = settings.dead_letter_topic
    with KafkaAdmin(settings.client_config()) as admin:
        partitions = admin.cluster(_ANSWER_SECONDS).partitions.get(topic)
    if partitions is None:
        raise TopicMismatch(f"the cluster lacks {topic}: run `agent-metadata topics create`")
    reader = RangeReader(settings.client_config(), topic)
    try:
        ranges = reader.between(range(partitions), None, None)
        total, done = sum(offsets.length for offsets in ranges), 0

        def on_read(records: int) -> None:
            nonlocal done
            done += records
            on_progress(done, total)

        for offsets in ranges:
            for message in reader.records(offsets, on_read):
                letter = dead_letter_of(message)
                if chosen.matches(letter):
                    yield letter
    finally:
        reader.close()


async def redrive(
    settings: Settings,
    chosen: Filter,
    *,
    max_redrives: int,
    dry_run: bool = False,
    on_refused: Callable[[DeadLetter, str], None] = lambda _letter, _reason: None,
    on_progress: Progress = lambda _done, _total: None,
) -> Redriven:
    """Make reports of dead letters again and produce them to the events topic.

    Guarantee: each entry keeps the time it had, so that a row never goes back, however often this is called. What
    would be refused again stays where it is, and so does what was redriven `max_redrives` times already. The
    dead-letter topic is only read. A dry run counts exactly what a real one would then do.

    Raises:
        TopicMismatch, ServiceUnavailable: Kafka can't be read; PipelineError: it did not take all; run it again.
    """
    # Read twice rather than kept: a row that Postgres refuses comes back without headers, so the same report again
    # says how often it was tried; and of several only the last is sent.
    seen: Counter[bytes] = Counter()
    counts: Counter[str] = Counter()
    for letter in dead_letters(settings, chosen):
        reports = _restored(settings, letter)
        if isinstance(reports, str):
            on_refused(letter, reports)
        else:
            seen[_digest(reports)] += 1
    left = seen.copy()
    # As MetadataProducer places them, so that an agent's reports stay in one partition.
    publisher = Publisher({**settings.client_config(), "partitioner": "murmur2"})
    acknowledgements: list[asyncio.Future[None]] = []
    try:
        for letter in dead_letters(settings, chosen, on_progress=on_progress):
            reports = _restored(settings, letter)
            digest = b"" if isinstance(reports, str) else _digest(reports)
            left[digest] -= 1
            if isinstance(reports, str):
                counts["refused"] += 1
            elif left[digest] > 0:
                counts["duplicates"] += 1
            elif left[digest] < 0:
                continue  # came while this ran
            elif max(letter.redrives, seen[digest] - 1) >= max_redrives:
                counts["came_back"] += 1
                on_refused(letter, f"redriven {max_redrives} times already; mend the cause, or raise --max-redrives")
            else:
                counts["redriven"] += 1
                if not dry_run:
                    acknowledgements += await _send(settings, publisher, letter, reports)
                    if len(acknowledgements) >= _MOST_UNACKNOWLEDGED:
                        await asyncio.gather(*acknowledgements)
                        acknowledgements.clear()
        await asyncio.gather(*acknowledgements)
    finally:
        not_acknowledged = await publisher.close(_FLUSH_SECONDS)
    if not_acknowledged:
        raise PipelineError(f"Kafka did not acknowledge {not_acknowledged} reports; run it again, which is harmless")
    fields = {name: counts[name] for name in ("redriven", "refused", "duplicates", "came_back")}
    return Redriven(matched=sum(fields.values()), **fields)


def _restored(settings: Settings, letter: DeadLetter) -> list[Report] | str:
    try:
        return restore(letter, max_clock_skew=settings.max_clock_skew)
    except DecodeError as error:
        return str(error)


def _digest(reports: list[Report]) -> bytes:
    return blake2b(b"\n".join(map(encode_report, reports)), digest_size=16).digest()


async def _send(
    settings: Settings, publisher: Publisher, letter: DeadLetter, reports: list[Report]
) -> list[asyncio.Future[None]]:
    original = [(name, value) for name, value in letter.original if name != REDRIVES_HEADER]
    headers = [*original, (REDRIVES_HEADER, str(letter.redrives + 1).encode())]
    return [
        await publisher.send(
            settings.events_topic, encode_report(report), key=report.agent_id.encode(), headers=headers
        )
        for report in reports
    ]
