"""Whatever bytes a record holds, the fold takes it or rejects it with a reason, and no other record suffers."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given

from pipeline.core.decoding import RecordDecoder
from pipeline.core.record import CREATE_TIME, LOG_APPEND_TIME, KafkaRecord
from pipeline.core.report import (
    MAX_ERROR_BYTES,
    MAX_KEY_CHARS,
    MAX_TIMESTAMP_US,
    MAX_VALUE_BYTES,
    MIN_TIMESTAMP_US,
    Entry,
    Report,
    encode_report,
)
from pipeline.core.window import OpenWindow
from pipeline.testing import record
from tests.support.bad_input import CASES, T0
from tests.support.documentation import table_rows
from tests.support.strategies import RECORD_VALUES, check_decoders

A1, A2 = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
T0_MS = 1_704_067_200_000


def fold(*bad, agent_is_known=False):
    """Fold a record batch of these between two good ones; return (rows of other agents, rejected reasons)."""
    decoder = RecordDecoder()
    if agent_is_known:
        decoder.agent_ids.learn(A1)
    last = len(bad) + 1
    closed = []
    for records in ([record(0, A2, k="before")], bad, [record(last, A2, l="after")]):
        index = 0
        while index < len(records):
            window = OpenWindow(0, capacity=10**6, max_clock_skew=timedelta(seconds=60), decoder=decoder)
            index = window.fold(records, index)
            closed.append(window.close("scheduled", 1))
    assert (closed[0].first, closed[-1].last) == (0, last)
    rows = [row for window in closed for row in window.rows]
    assert [row.value for row in rows if row.agent_id == A2] == ["before", "after"]
    reasons = [rejected.reason for window in closed for rejected in window.rejected]
    return [row for row in rows if row.agent_id != A2], reasons


@given(RECORD_VALUES)
def test_decoders_of_any_bytes_keep_the_limits_or_say_why_not(value):
    check_decoders(value)


@given(RECORD_VALUES)
@example(b"")
@example(b"null")
def test_fold_of_any_bytes_is_a_row_or_a_reason(value):
    rows, reasons = fold(KafkaRecord(1, T0_MS, None, value))
    assert all(reasons)
    for row in rows:
        assert str(uuid.UUID(row.agent_id)) == row.agent_id
        assert len(row.key) <= MAX_KEY_CHARS
        assert len(row.value.encode()) <= MAX_VALUE_BYTES
        assert len(row.error.encode()) <= MAX_ERROR_BYTES
        assert "\0" not in row.key + row.value + row.error
        assert MIN_TIMESTAMP_US <= row.collected_at_us <= MAX_TIMESTAMP_US


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
@pytest.mark.parametrize("timestamp_type", [LOG_APPEND_TIME, CREATE_TIME])
@pytest.mark.parametrize("agent_is_known", [False, True])
def test_fold_of_bad_input_gives_the_documented_rows_and_reason(case, timestamp_type, agent_is_known):
    appended_ms = T0_MS if case.timestamp_ms is None else case.timestamp_ms
    bad = KafkaRecord(1, appended_ms, None, case.value, timestamp_type=timestamp_type)
    rows, reasons = fold(bad, agent_is_known=agent_is_known)
    assert {row.key: (row.value, row.error, row.collected_at) for row in rows} == {
        key: (value, error, at or T0) for key, (value, error, at) in case.rows.items()
    }
    assert len(reasons) == (case.reason is not None)
    assert all(case.reason in reason for reason in reasons)


@pytest.mark.parametrize("is_first", [True, False])
def test_fold_judges_each_record_of_a_create_time_topic_by_its_own_timestamp(is_first):
    """One record's clock, decades ahead, must not let another's time through."""
    ahead = encode_report(Report(A1, [Entry("k", "v")], datetime(2050, 1, 1, tzinfo=UTC)))
    records = [
        KafkaRecord(0, 2_840_140_800_000, None, b"{}", timestamp_type=CREATE_TIME),
        KafkaRecord(1, T0_MS, None, ahead, timestamp_type=CREATE_TIME),
    ]
    window = OpenWindow(0, capacity=10**6, max_clock_skew=timedelta(seconds=60))
    window.fold(records if is_first else records[::-1])
    assert [row.collected_at for row in window.close("scheduled", 1).rows] == [T0]


def test_bad_input_of_designs_table_and_of_the_tests_is_the_same():
    assert {row[0] for row in table_rows("DESIGN.md", "Bad input")} == {case.row for case in CASES}
