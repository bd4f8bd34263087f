"""Whatever bytes a record holds, the fold takes it or rejects it with a reason, and no other record suffers."""

import json
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.report import (
    MAX_ERROR_BYTES,
    MAX_KEY_CHARS,
    MAX_TIMESTAMP_US,
    MAX_VALUE_BYTES,
    MIN_TIMESTAMP_US,
    Entry,
    Report,
    encode_report,
)
from pipeline.testing import FakeRecord, record
from pipeline.window import OpenWindow

A1, A2 = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
T0_MS = 1_704_067_200_000
FIELDS = ["agent_id", "entries", "collected_at", "key", "value", "error"]
TOO_LONG = "value of {} bytes exceeded 2048 bytes"
GOOD = encode_report(Report(A1, [Entry("cpu", "12%"), Entry("mem", "1 GB")], datetime(2024, 1, 1, tzinfo=UTC)))


def fold(*values):
    """Fold these record values between two good records; return (rows of other agents, rejected reasons)."""
    window = OpenWindow(0, capacity=10**6, max_clock_skew=timedelta(seconds=60))
    records = [
        record(0, A2, k="before"),
        *(FakeRecord(offset, T0_MS, None, value) for offset, value in enumerate(values, start=1)),
        record(len(values) + 1, A2, l="after"),
    ]
    assert window.fold(records) == len(records)
    closed = window.close("scheduled", 1)
    assert (closed.first, closed.last) == (0, len(values) + 1)
    assert [row.value for row in closed.rows if row.agent_id == A2] == ["before", "after"]
    return [row for row in closed.rows if row.agent_id != A2], [rejected.reason for rejected in closed.rejected]


@st.composite
def damaged(draw):
    """A good report with some bytes changed, left out or put in."""
    raw = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw) - 1))
        raw[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(raw)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner),
    max_leaves=12,
)


@given(st.one_of(st.none(), st.binary(max_size=300), damaged(), anything.map(lambda it: json.dumps(it).encode())))
@example(b"")
@example(b"null")
def test_fold_of_any_bytes_is_a_row_or_a_reason(value):
    rows, reasons = fold(value)
    assert all(reasons)
    for row in rows:
        assert str(uuid.UUID(row.agent_id)) == row.agent_id
        assert len(row.key) <= MAX_KEY_CHARS
        assert len(row.value.encode()) <= MAX_VALUE_BYTES
        assert len(row.error.encode()) <= MAX_ERROR_BYTES
        assert "\0" not in row.key + row.value + row.error
        assert MIN_TIMESTAMP_US <= row.collected_at_us <= MAX_TIMESTAMP_US


def entries(*given, **more):
    return json.dumps({"agent_id": A1, "entries": list(given), **more}).encode()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (GOOD[:-1], "truncated"),
        (GOOD + b"}", "trailing"),
        (b"\xef\xbb\xbf" + GOOD, "malformed"),
        (GOOD.replace(b"12%", b"\xff\xfe"), "can't decode byte"),
        (json.dumps({"entries": []}).encode(), "agent_id"),
        (json.dumps({"agent_id": A1}).encode(), "entries"),
        (json.dumps({"agent_id": 7, "entries": []}).encode(), "Expected `str`"),
        (json.dumps({"agent_id": "agent-7", "entries": []}).encode(), "not a UUID"),
        (entries({"value": "no key"}), "key"),
        (entries({"key": "k", "value": None}), "got `null`"),
        (entries({"key": "k", "value": 1.5}), "got `float`"),
        (entries({"key": "k" * 128, "value": "v"}), "128 characters"),
        (entries({"key": "k"}, collected_at="2024-01-01T00:00:00"), "timezone"),
        (entries({"key": "k"}, collected_at="yesterday"), "collected_at"),
        (entries({"key": "k"}, collected_at="10000-01-01T00:00:00Z"), "collected_at"),
    ],
)
def test_fold_of_a_bad_record_gives_its_reason(value, reason):
    rows, reasons = fold(value)
    assert rows == []
    assert len(reasons) == 1
    assert reason in reasons[0]


@pytest.mark.parametrize(
    ("value", "row"),
    [
        (entries({"key": "k", "value": "a\0b"}), ("k", "a\ufffdb", "")),
        (entries({"key": "k", "value": "\ud800"}), ("k", "\ufffd", "")),
        (
            entries({"key": "k", "value": "x" * 5_000_000}),
            ("k", "x" * 2048, TOO_LONG.format(5_000_000)),
        ),
        (
            entries({"key": "k", "value": "a" + "é" * 1024}),
            ("k", "a" + "é" * 1023, TOO_LONG.format(2049)),
        ),
        (entries({"key": "k", "value": "first"}, {"key": "k", "value": "last"}), ("k", "last", "")),
        (entries({"key": "k", "unit": "%"}, version=9), ("k", "", "")),
    ],
)
def test_fold_repairs_what_can_be_repaired(value, row):
    rows, reasons = fold(value)
    assert [row[1:4] for row in rows] == [row]
    assert reasons == []


@pytest.mark.parametrize(
    ("collected_at", "microseconds"),
    [
        ("2024-01-01T14:00:00+14:00", 1_704_067_200_000_000),
        ("2023-12-31T23:59:59.123456789Z", 1_704_067_199_123_457),
        ("0001-01-01T00:00:00Z", MIN_TIMESTAMP_US),
        ("0001-01-01T00:00:00+14:00", MIN_TIMESTAMP_US),
        ("9999-12-31T23:59:59Z", T0_MS * 1000),
        ("9999-12-31T23:59:59-14:00", T0_MS * 1000),
    ],
)
def test_fold_takes_any_time_with_an_offset_and_never_one_from_the_future(collected_at, microseconds):
    rows, _ = fold(entries({"key": "k"}, collected_at=collected_at))
    assert [row.collected_at_us for row in rows] == [microseconds]


def test_fold_of_a_report_without_entries_is_nothing():
    assert fold(entries()) == ([], [])


def test_fold_of_100_000_entries_keeps_what_the_keys_limit_allows_and_says_so():
    rows, (reason,) = fold(entries(*({"key": f"{number:06}"} for number in range(100_000))))
    assert len(rows) == 1024
    assert "98976 entries were left out" in reason
