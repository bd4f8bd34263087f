import uuid
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.core.batch import Row, Source, WindowSpan, encode_batch, split
from pipeline.core.dead_letter import REDRIVES_HEADER, dead_letter_headers, read_dead_letter, restore
from pipeline.core.report import MAX_TIMESTAMP_US, Entry, Report, agent_uuid, encode_report, timestamp_us
from pipeline.errors import DecodeError

AGENT = str(uuid.UUID(int=7))
APPENDED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
APPENDED_MS = timestamp_us(APPENDED) // 1000
SKEW = timedelta(seconds=60)


def letter(value, *, stage="worker", timestamp_ms=APPENDED_MS, original=(), **said):
    headers = dead_letter_headers(
        topic="events",
        partition=3,
        offset=17,
        stage=stage,
        error_class="DecodeError",
        message="why",
        timestamp_ms=timestamp_ms,
        original=original,
        **said,
    )
    return read_dead_letter(
        partition=0, offset=5, appended_ms=APPENDED_MS + 999, key=AGENT.encode(), value=value, headers=headers
    )


def report(collected_at=None, **values):
    return encode_report(Report(AGENT, [Entry(key, value) for key, value in values.items()], collected_at))


def test_headers_are_read_back_as_they_were_said():
    read = letter(b"x", original=[("from", b"test"), (REDRIVES_HEADER, b"2")], sqlstate="23514")
    assert read.original == [("from", b"test"), (REDRIVES_HEADER, b"2")]
    assert (read.stage, read.source, read.agent) == ("worker", "events[3]@17", AGENT)
    assert read.reason == "why (SQLSTATE 23514)"
    assert (read.timestamp_ms, read.redrives) == (APPENDED_MS, 2)


def test_letter_of_another_program_says_what_it_can():
    read = read_dead_letter(partition=0, offset=5, appended_ms=4, key=None, value=None, headers=[("h", b"\xff")])
    assert (read.stage, read.source, read.reason, read.agent) == ("unknown", "?[?]@?", "no reason given", "")
    assert (read.timestamp_ms, read.redrives) == (4, 0)


@pytest.mark.parametrize(
    ("collected_at", "expected"),
    [
        (None, APPENDED),
        (APPENDED - timedelta(days=1), APPENDED - timedelta(days=1)),
        (APPENDED + SKEW, APPENDED + SKEW),
        (APPENDED + timedelta(hours=1), APPENDED),
    ],
)
def test_restored_report_keeps_the_time_that_counted_for_the_original_record(collected_at, expected):
    (restored,) = restore(letter(report(collected_at, cpu="1", mem="2")), max_clock_skew=SKEW)
    assert restored.agent_id == AGENT
    assert [(entry.key, entry.value, entry.collected_at) for entry in restored.entries] == [
        ("cpu", "1", expected),
        ("mem", "2", expected),
    ]


def test_restored_row_that_postgres_refused_is_the_row():
    (restored,) = restore(letter(report(APPENDED, cpu="1"), stage="sink", sqlstate="23514"), max_clock_skew=SKEW)
    assert restored == Report(AGENT, [Entry("cpu", "1", "", APPENDED)])


@pytest.mark.parametrize(
    "value", [b"{", None, b'{"version":2}', report(**{"k" * 128: "v"}), b'{"agent_id":"","entries":[]}']
)
@pytest.mark.parametrize("stage", ["worker", "sink"])
def test_what_would_be_refused_again_says_why(value, stage):
    with pytest.raises(DecodeError):
        restore(letter(value, stage=stage), max_clock_skew=SKEW)


def test_row_whose_time_no_report_can_carry_would_be_refused_again():
    source, window = Source("events", "id", 0, 0, 9), WindowSpan(0, 1)
    rows = [Row(AGENT, "cpu", "v", "", MAX_TIMESTAMP_US + 1)]
    (batch,) = split(rows, source=source, window=window, reason="scheduled", batch_size=500)
    with pytest.raises(DecodeError, match="outside the years 1 to 9999"):
        restore(letter(encode_batch(batch), stage="sink"), max_clock_skew=SKEW)


def test_batch_that_can_be_read_now_becomes_reports_of_its_rows():
    rows = [Row(AGENT, key, "v" + key, "", timestamp_us(APPENDED)) for key in ("cpu", "mem")]
    source, window = Source("events", "id", 0, 0, 9), WindowSpan(0, 1)
    (batch,) = split(rows, source=source, window=window, reason="scheduled", batch_size=500)
    restored = restore(letter(encode_batch(batch), stage="sink"), max_clock_skew=SKEW)
    assert restored == [
        Report(AGENT, [Entry("cpu", "vcpu", "", APPENDED)]),
        Report(AGENT, [Entry("mem", "vmem", "", APPENDED)]),
    ]


@pytest.mark.parametrize("name", ["host-18", str(uuid.UUID(int=8))])
def test_row_with_another_agents_name_comes_back_under_its_own_id(name):
    """The batch may be another program's."""
    own, named = AGENT, agent_uuid("host-17")
    rows = [Row(agent_id, "cpu", "v", "", timestamp_us(APPENDED)) for agent_id in sorted([own, named])]
    source, window = Source("events", "id", 0, 0, 9), WindowSpan(0, 1)
    names = {own: name, named: "host-17"}
    (batch,) = split(rows, source=source, window=window, reason="scheduled", batch_size=500, names=names)
    restored = restore(letter(encode_batch(batch), stage="sink"), max_clock_skew=SKEW)
    assert {report.agent_id for report in restored} == {own, "host-17"}
