"""What is written to the dead-letter topic can be read, and be redriven."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from pipeline.core.batch import Row
from pipeline.core.dead_letter import read_dead_letter, restore
from pipeline.core.record import KafkaRecord
from pipeline.core.report import timestamp_us
from pipeline.errors import RowRejected
from pipeline.kafka.dead_letters import DeadLetterWriter

AGENT = str(UUID(int=1))
T0 = datetime(2024, 1, 1, tzinfo=UTC)


class Publisher:
    """Keeps what is sent and acknowledges it at once."""

    def __init__(self):
        self.letters = []

    async def send(self, topic, value, *, key=None, headers=()):
        assert topic == "dead-letter"
        self.letters.append(
            read_dead_letter(
                partition=0, offset=0, appended_ms=1_704_067_200_000, key=key, value=value, headers=headers
            )
        )
        acknowledged = asyncio.get_running_loop().create_future()
        acknowledged.set_result(None)
        return acknowledged


@pytest.fixture
def publisher():
    return Publisher()


async def test_record_keeps_its_bytes_and_gains_where_it_was_and_why_it_was_refused(publisher):
    writer = DeadLetterWriter(publisher, "dead-letter", stage="worker", source_topic="events")
    record = KafkaRecord(9, 1_704_067_200_000, b"key", b"\xff", (("trace", b"1"),))
    await (await writer.write_record(3, record, "not a report"))
    (letter,) = publisher.letters
    assert (letter.key, letter.value, letter.original) == (b"key", b"\xff", [("trace", b"1")])
    assert (letter.source, letter.stage, letter.reason) == ("events[3]@9", "worker", "not a report")
    assert letter.timestamp_ms == record.timestamp


async def test_refused_row_is_a_report_that_can_be_redriven(publisher):
    writer = DeadLetterWriter(publisher, "dead-letter", stage="sink", source_topic="batches")
    row = Row(AGENT, "cpu", "12%", "", timestamp_us(T0))
    await (await writer.write_row(2, row, RowRejected("too long", sqlstate="22001")))
    (letter,) = publisher.letters
    assert (letter.agent, letter.reason) == (AGENT, "too long (SQLSTATE 22001)")
    (report,) = restore(letter, max_clock_skew=timedelta(60))
    (entry,) = report.entries
    assert (report.agent_id, entry.key, entry.value) == (AGENT, "cpu", "12%")
    assert entry.collected_at == T0
