"""Writes what a stage can't use to the dead-letter topic, with where it came from and why it was refused."""

from __future__ import annotations

import asyncio

from pipeline.core.batch import Row
from pipeline.core.dead_letter import Stage, dead_letter_headers
from pipeline.core.record import Record
from pipeline.core.report import Entry, Report, encode_report
from pipeline.errors import RowRejected
from pipeline.kafka.publisher import Publisher


class DeadLetterWriter:
    """Writes the dead letters of one stage, which reads `source_topic`.

    Each method queues one dead letter and returns a future that is done when Kafka has acknowledged it.
    """

    def __init__(self, publisher: Publisher, topic: str, *, stage: Stage, source_topic: str) -> None:
        self._publisher = publisher
        self._topic = topic
        self._stage: Stage = stage
        self._source_topic = source_topic

    async def write_record(self, partition: int, record: Record, reason: str) -> asyncio.Future[None]:
        """Write a record of the source topic as it came, key and headers included."""
        headers = dead_letter_headers(
            topic=self._source_topic,
            partition=partition,
            offset=record.offset,
            timestamp_ms=record.timestamp,
            stage=self._stage,
            error_class="DecodeError",
            message=reason,
            original=tuple(record.headers),
        )
        return await self._publisher.send(self._topic, record.value, key=record.key, headers=headers)

    async def write_row(self, partition: int, row: Row, error: RowRejected) -> asyncio.Future[None]:
        """Write a row that Postgres refuses as a report of one entry, ready to be redriven once the cause is fixed."""
        headers = dead_letter_headers(
            topic=self._source_topic,
            partition=partition,
            offset=-1,  # a row of several merged batches has none
            stage=self._stage,
            error_class="RowRejected",
            message=str(error),
            sqlstate=error.sqlstate,
        )
        report = Report(row.agent_id, [Entry(row.key, row.value, row.error)], row.collected_at)
        key = row.agent_id.encode()
        return await self._publisher.send(self._topic, encode_report(report), key=key, headers=headers)
