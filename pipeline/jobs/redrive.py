"""List the dead letters, and redrive them: produce them to the events topic again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Final, NamedTuple

from pipeline.core.dead_letter import REDRIVES_HEADER, DeadLetter, restore
from pipeline.core.decoding import RecordDecoder
from pipeline.core.report import Report, agent_uuid, encode_report
from pipeline.errors import ANSWER_SECONDS, DecodeError, PipelineError, TopicMismatch
from pipeline.formats.decoder import decoders
from pipeline.kafka.admin import KafkaAdmin
from pipeline.kafka.publisher import PARTITIONER, Publisher
from pipeline.kafka.range_reader import RangeReader
from pipeline.kafka.records import dead_letter_of
from pipeline.settings import Settings

# Reports that may wait for Kafka's acknowledgement at once.
_MAX_UNACKNOWLEDGED: Final = 1000
_FLUSH_SECONDS: Final = 15.0

Progress = Callable[[int, int], None]


class LetterFilter(NamedTuple):
    """Which dead letters to choose; None matches any.

    `reason` is part of the reason, ignoring case; `offset` is (partition, offset) in the dead-letter topic.
    """

    agent: str | None = None
    stage: str | None = None
    reason: str | None = None
    offset: tuple[int, int] | None = None

    def matches(self, letter: DeadLetter) -> bool:
        """Tell whether a dead letter is chosen."""
        return (
            (self.agent is None or _is_same_agent(self.agent, letter.agent))
            and (self.stage is None or letter.stage == self.stage)
            and (self.reason is None or self.reason.lower() in letter.reason.lower())
            and (self.offset is None or self.offset == (letter.partition, letter.offset))
        )


def _is_same_agent(one: str, other: str) -> bool:
    """Tell whether two texts are the same agent's: the same name, or its UUID in any spelling."""
    try:
        return one == other or agent_uuid(one) == agent_uuid(other)
    except DecodeError:
        return False


class RedriveCounts(NamedTuple):
    """What a redrive did, in dead letters: `matched` is the sum of the others.

    `refused` would be refused again; `duplicates` have the same reports as a later one; `came_back` were redriven too
    often already.
    """

    matched: int
    redriven: int
    refused: int
    duplicates: int
    came_back: int


def dead_letters(
    settings: Settings, chosen: LetterFilter, *, on_progress: Progress = lambda _done, _total: None
) -> Iterator[DeadLetter]:
    """Iterate over what the dead-letter topic holds now, oldest first.

    Raises:
        TopicMismatch, ServiceUnavailable: the topic can't be read.
    """
    topic = settings.dead_letter_topic
    with KafkaAdmin(settings.client_config()) as admin:
        partitions = admin.cluster(ANSWER_SECONDS).partitions.get(topic)
    if partitions is None:
        raise TopicMismatch(f"the cluster lacks {topic}: run `agent-metadata topics create`")
    reader = RangeReader(settings.client_config(), topic)
    try:
        ranges = reader.between(range(partitions), None, None)
        reading = _Reading(sum(offsets.length for offsets in ranges), on_progress)
        for offsets in ranges:
            for message in reader.records(offsets, reading.advance):
                letter = dead_letter_of(message)
                if chosen.matches(letter):
                    yield letter
    finally:
        reader.close()


class _Reading:
    """Turns records read one after the other into progress towards a total."""

    def __init__(self, total: int, on_progress: Progress) -> None:
        self._total = total
        self._done = 0
        self._on_progress = on_progress

    def advance(self, records: int) -> None:
        self._done += records
        self._on_progress(self._done, self._total)


async def redrive(
    settings: Settings,
    chosen: LetterFilter,
    *,
    max_redrives: int,
    dry_run: bool = False,
    on_refused: Callable[[DeadLetter, str], None] = lambda _letter, _reason: None,
    on_progress: Progress = lambda _done, _total: None,
) -> RedriveCounts:
    """Turn dead letters back into reports and produce these to the events topic.

    Guarantee: each entry keeps its time, so a row never moves back, however often this is called. A dead letter stays
    where it is if it would be refused again, or was redriven `max_redrives` times already; `on_refused(letter, reason)`
    is called then. The dead-letter topic is only read. A dry run counts exactly what a real run would do.

    Raises:
        ConfigError: the events topic does not hold our own reports: mend the settings and replay its records instead.
        TopicMismatch, ServiceUnavailable: Kafka can't be read.
        PipelineError: Kafka did not acknowledge all reports; run it again.
    """
    settings.require_own_reports(
        "a redrive produces reports",
        advice="mend the settings and `replay` the time range instead, which reads the records where they are",
    )
    # The topic is read twice, to save memory. A row that Postgres refuses comes back without its headers, so the
    # number of equal reports tells how often it was tried; of equal ones only the last is sent.
    decoder = decoders(settings)()
    seen: Counter[bytes] = Counter()
    counts: Counter[str] = Counter()
    for letter in dead_letters(settings, chosen):
        reports = _restored(settings, letter, decoder)
        if isinstance(reports, str):
            on_refused(letter, reports)
        else:
            seen[_digest(reports)] += 1
    remaining = seen.copy()
    publisher = Publisher({**settings.client_config(), "partitioner": PARTITIONER})
    acknowledgements: list[asyncio.Future[None]] = []
    try:
        for letter in dead_letters(settings, chosen, on_progress=on_progress):
            reports = _restored(settings, letter, decoder)
            digest = b"" if isinstance(reports, str) else _digest(reports)
            remaining[digest] -= 1
            if isinstance(reports, str):
                counts["refused"] += 1
            elif remaining[digest] > 0:
                counts["duplicates"] += 1
            elif remaining[digest] < 0:
                continue  # arrived after the first reading
            elif max(letter.redrives, seen[digest] - 1) >= max_redrives:
                counts["came_back"] += 1
                on_refused(letter, f"redriven {max_redrives} times already; fix the cause, or raise --max-redrives")
            else:
                counts["redriven"] += 1
                if not dry_run:
                    acknowledgements += await _send(settings, publisher, letter, reports)
                    if len(acknowledgements) >= _MAX_UNACKNOWLEDGED:
                        await asyncio.gather(*acknowledgements)
                        acknowledgements.clear()
        await asyncio.gather(*acknowledgements)
    finally:
        not_acknowledged = await publisher.close(_FLUSH_SECONDS)
    if not_acknowledged:
        raise PipelineError(f"Kafka did not acknowledge {not_acknowledged} reports; run it again, which is safe")
    fields = {name: counts[name] for name in ("redriven", "refused", "duplicates", "came_back")}
    return RedriveCounts(matched=sum(fields.values()), **fields)


def _restored(settings: Settings, letter: DeadLetter, decoder: RecordDecoder) -> list[Report] | str:
    try:
        return restore(letter, max_clock_skew=settings.max_clock_skew, decoder=decoder)
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
